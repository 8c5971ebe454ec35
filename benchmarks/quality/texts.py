"""Texts by genre to judge on, without downloads: books, Python's sources and reference, licences.

Two hub data sets join where a hub answers. Two books are for calibration and never judged on.
"""

from __future__ import annotations

import argparse
import asyncio.base_events
import configparser
import dataclasses
import difflib
import hashlib
import inspect
import pydoc_data.topics
import re
import shutil
import subprocess
import sysconfig
import tarfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from spectral_paged.errors import InvalidRequestError

FICTION = ("sherlock_holmes", "alice", "moby_dick", "cask_of_amontillado")
CALIBRATION = ("pride_and_prejudice", "time_machine")
MODULES: tuple[ModuleType, ...] = (
    argparse,
    asyncio.base_events,
    dataclasses,
    tarfile,
    inspect,
    subprocess,
    difflib,
    threading,
    configparser,
    shutil,
)
LICENCES = ("GPL-3", "MPL-2.0", "LGPL-2.1", "Apache-2.0", "GFDL-1.3", "GPL-2", "Artistic")
MIN_CHARS = 6000  # least size of a licence; a shorter one gives no context worth judging
HUB_CHARS = 400_000
HUB_SETS = {  # genre -> (data set, configuration, split), read in streaming mode
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """One text; `name` is its source."""

    genre: str
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def book_folder() -> Path:
    """The folder `examples/texts` of the working folder, else of this file's checkout."""
    here = Path("examples/texts")
    return here if here.is_dir() else Path(__file__).resolve().parents[2] / "examples" / "texts"


def read(genre: str, name: str, files: Iterable[Path]) -> Text | None:
    """The first of `files` that can be read, or None."""
    for file in files:
        if file.is_file():
            return Text(genre, name, file.read_text(encoding="utf-8", errors="replace"))
    return None


def books(names: Sequence[str]) -> list[Text]:
    found = (read("fiction", f"{n}.txt", [book_folder() / f"{n}.txt"]) for n in names)
    return [t for t in found if t is not None]


def stdlib_sources() -> list[Text]:
    """Sources of the running Python; they differ between its versions, so note the hashes."""
    files = [(m.__name__, Path(m.__file__ or "")) for m in MODULES]
    found = (read("code", f"{name}.py", [file.with_suffix(".py")]) for name, file in files)
    return [t for t in found if t is not None]


def language_reference() -> list[Text]:
    """The language reference that `help()` prints, topics in alphabetical order."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(re.sub(r"\n{3,}", "\n\n", topics[t]).strip() for t in sorted(topics))
    return [Text("reference", "pydoc_data.topics", text)]


def licences() -> list[Text]:
    """Licences of the system (Debian keeps them in one folder), else of installed packages."""
    folder = Path("/usr/share/common-licenses")
    found = [read("legal", name, [folder / name]) for name in LICENCES]
    texts = [t for t in found if t is not None]
    if not texts:
        packages = Path(sysconfig.get_path("purelib"))
        files = sorted(packages.glob("*.dist-info/**/*LICEN[CS]E*"))
        found = [read("legal", str(f.relative_to(packages)), [f]) for f in files]
        texts = [t for t in found if t is not None]
    kept = {" ".join(t.text.split())[:2000]: t for t in reversed(texts) if len(t.text) >= MIN_CHARS}
    return list(kept.values())[::-1]


def named(argument: str) -> Text:
    """The text that an argument `FILE` or `GENRE=FILE` names.

    Raises:
        InvalidRequestError: the file is missing or empty.
    """
    genre, equals, file = argument.partition("=")
    if not equals:
        genre, file = "given", argument
    text = read(genre, Path(file).name, [Path(file)])
    if text is None or not text.text.strip():
        raise InvalidRequestError(
            f"--text {argument}: {file!r} is no file with text in it; give FILE or GENRE=FILE"
        )
    return text


def judged_texts(given: Sequence[str] | None = None) -> list[Text]:
    """The texts to judge on: those in `given`, else every genre that this machine has.

    Raises:
        InvalidRequestError: a named file cannot be read.
    """
    if given:
        return [named(argument) for argument in given]
    return books(FICTION) + stdlib_sources() + language_reference() + licences()


def calibration_texts() -> list[Text]:
    """Texts for calibration that are never judged on: two books, else a Python source."""
    found = books(CALIBRATION)
    if found:
        return found
    import typing  # not among MODULES

    text = read("code", "typing.py", [Path(typing.__file__)])
    return [text] if text is not None else []


def hub_texts() -> tuple[list[Text], list[str]]:
    """WikiText-2 and C4, if the `datasets` package and a hub are available.

    Returns the texts, and a note for each set that was not read with the reason.
    """
    try:
        import datasets
    except ImportError:
        return [], [f"{genre}: not run (no package `datasets`)" for genre in HUB_SETS]
    texts, notes = [], []
    for genre, (path, configuration, split) in HUB_SETS.items():
        try:
            rows = datasets.load_dataset(path, configuration, split=split, streaming=True)
            parts: list[str] = []
            size = 0
            for row in rows:
                parts.append(str(row["text"]))
                size += len(parts[-1])
                if size >= HUB_CHARS:
                    break
        except Exception as error:  # every failure of a network or a hub means: not run
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            notes.append(f"{genre}: not run ({reason[0][:160]})")
            continue
        texts.append(Text(genre, f"{path}/{configuration}/{split}", "\n".join(parts)))
    return texts, notes


def by_genre(texts: Sequence[Text]) -> dict[str, list[Text]]:
    """Texts of each genre, in the order given."""
    genres: dict[str, list[Text]] = {}
    for text in texts:
        genres.setdefault(text.genre, []).append(text)
    return genres


def manifest(texts: Sequence[Text]) -> list[dict[str, object]]:
    """Genre, name, size and hash of each text, for the head of a result file."""
    return [
        {"genre": t.genre, "name": t.name, "chars": len(t.text), "sha256": t.sha256} for t in texts
    ]
