"""Parts of a report's sections: titles, rows and cells as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]
KL_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the report; `plot` writes its picture to a path."""

    title: str
    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    plot: Callable[[Path], None] | None = None


def number(value: float | None, digits: int = 4) -> str:
    """`value` with fixed digits; None, which was not finite, becomes `not finite`."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def share(pair: Sequence[int] | None) -> str:
    """`[right, asked]` as the text right/asked."""
    return f"{pair[0]}/{pair[1]}" if pair and pair[1] else "-"


def points(value: float | None) -> str:
    """A share of 1 in percent."""
    return "-" if value is None else f"{100 * value:.1f}"


def by_ratio(methods: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Methods in order of their ratio, the largest pages first."""
    return sorted(methods.items(), key=lambda item: (item[1].get("ratio") or 0.0, item[0]))


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.{KL_DIGITS}f}"
