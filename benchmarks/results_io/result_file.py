"""The file of a result: its name, the model's label in it, and its writing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectral_paged.errors import InvalidRequestError


def file_stem(model: str) -> str:
    """The part of a result file's name that stands for the model."""
    return Path(model.replace(":", "-")).stem


def model_label(model: str) -> str:
    """A model's name in a result; for a local path its last part, because others lack the rest."""
    path = Path(model).expanduser()
    return path.name if path.exists() else model


def earlier_rows(path: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result in a file, if all else in it is as in `result`; none without a file.

    Raises:
        InvalidRequestError: it was measured with something else; names the fields.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(result))
    rows, _ = list(earlier.pop("rows")), now.pop("rows")
    if differ := [key for key in earlier | now if earlier.get(key) != now.get(key)]:
        raise InvalidRequestError(
            f"--append: {path} was measured with another {', '.join(differ)}: give another "
            "--output-dir or --name, or measure all rows again without --append"
        )
    return rows


def write_result(folder: Path, stem: str, result: Mapping[str, Any]) -> Path:
    """Write `folder/stem.json`, creating the folder if needed; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
