"""The file of a result: how it is called, and what it says of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def file_stem(model: str) -> str:
    """A model's name as part of a result file's."""
    return Path(model.replace(":", "-")).stem


def model_label(model: str) -> str:
    """A model's name in a result; of a local one the end of its path, which says all that others
    can use."""
    path = Path(model).expanduser()
    return path.name if path.exists() else model


def write_result(folder: Path, stem: str, result: Mapping[str, Any]) -> Path:
    """Write `folder/stem.json`, and the folder where it is missing; the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
