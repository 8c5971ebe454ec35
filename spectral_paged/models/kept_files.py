"""Files kept between runs: conversions of GGUF files and calibrations, in one folder.

The folder is `$SPECTRAL_PAGED_CACHE`, else `$XDG_CACHE_HOME/spectral-paged`, else
`~/.cache/spectral-paged`. A conversion is a folder in it with a manifest, which names the file that
was converted and the converter's version. A conversion of another version is never read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 2  # raised whenever the converter would write something else
MANIFEST = "gguf_conversion.json"
SCRATCH = ".being-made-"
CALIBRATIONS = "calibrations"


def cache_folder() -> Path:
    """The folder in which conversions and calibrations are kept."""
    if own := os.environ.get("SPECTRAL_PAGED_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spectral-paged"


def read_manifest(folder: Path) -> dict[str, Any]:
    """A conversion's manifest; empty where it is missing or cannot be read."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest in one rename, because another process may be reading it."""
    scratch = folder / f"{MANIFEST}.{os.getpid()}"
    try:
        scratch.write_text(json.dumps(content, indent=1))
        os.replace(scratch, folder / MANIFEST)
    except OSError as error:
        logger.debug("%s cannot be written (%s): the file is hashed at each start", folder, error)


def is_conversion(folder: Path) -> bool:
    """Return whether a folder is a conversion of this version."""
    return read_manifest(folder).get("version") == CONVERTER_VERSION


def conversions() -> Iterator[Path]:
    """The folders of complete conversions of this version."""
    for manifest in cache_folder().glob(f"*/{MANIFEST}"):
        if is_conversion(manifest.parent) and (manifest.parent / "config.json").exists():
            yield manifest.parent


def scratch_folder() -> Path:
    """Make a folder in which a conversion is written; a killed run leaves it behind."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=SCRATCH, dir=cache_folder()))


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A conversion (a folder) or a calibration (a file) that is kept between runs.

    Attributes:
        source: the file that a conversion was made of; "" where that is not known.
        is_used: True if a later run may read it; False if an earlier version or a killed run left
            it.
    """

    path: Path
    kind: Literal["conversion", "calibration"]
    num_bytes: int
    source: str
    is_used: bool

    @property
    def name(self) -> str:
        return self.path.name

    def delete(self) -> None:
        """Remove it from the disk; a running process has it in memory or open."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def kept_files() -> list[KeptFile]:
    """All kept conversions, then all kept calibrations.

    Other files in the folder are left out, because they may be the user's own.
    """
    folder = cache_folder()
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        manifest = read_manifest(path)
        earlier = re.search(r"-[0-9a-f]{16}$", path.name) and (path / "config.json").is_file()
        if path.is_dir() and (manifest or earlier or path.name.startswith(SCRATCH)):
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            source = str(manifest.get("source", ""))
            found.append(KeptFile(path, "conversion", size, source, is_conversion(path)))
    for path in sorted((folder / CALIBRATIONS).glob("*.safetensors")):
        found.append(KeptFile(path, "calibration", path.stat().st_size, "", True))
    return found
