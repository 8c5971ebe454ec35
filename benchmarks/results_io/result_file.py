"""The file of a result: its name, the model's label in it, and its writing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def file_stem(model: str) -> str:
    """The part of a result file's name that stands for the model."""
    return Path(model.replace(":", "-")).stem


def model_label(model: str) -> str:
    """A model's name in a result; for a local path its last part, because others lack the rest."""
    path = Path(model).expanduser()
    return path.name if path.exists() else model


def write_result(folder: Path, stem: str, result: Mapping[str, Any]) -> Path:
    """Write `folder/stem.json`, creating the folder if needed; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
