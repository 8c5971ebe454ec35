"""A journal of finished work, a JSON line each, so that a rerun resumes where the last stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BASELINE = "baseline"  # the method name of the model without a compressed cache


def digest(*parts: object) -> str:
    """A short hash of `parts`, 24 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def plain(value: Any) -> Any:
    """`value` in a form that JSON has; numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def kind_of(record: Record) -> tuple[Any, ...]:
    """The task, length and segment of a record; units of work of one kind have the same methods."""
    return tuple(str(record.get(key)) for key in ("task", "length", "segment"))


class Journal:
    """Records of one model, keyed by (model, unit of work, method).

    Args:
        path: the file, made when the first record is written; None keeps records in memory.
        model: name of model, precision and device; records of others are ignored.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self.path, self.model = path, model
        self._records: dict[str, Record] = {}
        self._used: dict[str, None] = {}
        if path is not None and path.is_file():
            self._records = {r["key"]: r for r in read_records(path) if r["model"] == model}
            if not path.read_bytes().endswith(b"\n"):  # a crash cut the last line off
                with open(path, "a", encoding="utf-8") as file:
                    file.write("\n")

    def __len__(self) -> int:
        return len(self._records)

    def used(self) -> list[Record]:
        """Records that this run has found or written, without older work of the file."""
        return [self._records[key] for key in self._used]

    def use_all(self) -> int:
        """Count every record of the model as used, except in units of work that were cut off.

        Work is cut off at its end: the last unit of a kind is left out if it lacks methods that
        the unit before it has. If a unit has a method twice, because its code changed, the last
        record counts. Returns the number of units left out.
        """
        kinds: dict[tuple[Any, ...], dict[str, dict[str, str]]] = defaultdict(dict)
        for key, record in self._records.items():
            units = kinds[kind_of(record)]
            units.setdefault(record["unit"], {})[record["method"]] = key
        self._used, num_cut = {}, 0
        for units in kinds.values():
            *_, before, last = [None, *units]
            whole = before is None or last is None or not units[last].keys() < units[before].keys()
            if not whole:
                del units[last]
                num_cut += 1
            self._used |= {key: None for methods in units.values() for key in methods.values()}
        return num_cut

    def find(self, unit: str, method: str) -> Record | None:
        key = digest(self.model, unit, method)
        if key in self._records:
            self._used[key] = None
        return self._records.get(key)

    def write(self, unit: str, method: str, record: Mapping[str, Any]) -> Record:
        """Add a record and write it to disk at once; returns it."""
        key = digest(self.model, unit, method)
        line: Record = plain({"key": key, "model": self.model, "unit": unit, **record})
        self._records[key] = line
        self._used[key] = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
        return line


def read_records(path: Path) -> list[Record]:
    """All records of a file, without a last line that a crash cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def merged(paths: Sequence[Path]) -> list[Record]:
    """Records of several files; a later one replaces an earlier one of the same key."""
    return list({r["key"]: r for path in paths for r in read_records(path)}.values())
