"""Repeating ends of a completion are found, so that it can end early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from spectral_paged.errors import SamplingParamsError, shown

MAX_PATTERN_SIZE = 1024  # tokens; each size is looked for after every token
_SIZE = {"type": "integer", "minimum": 0, "maximum": MAX_PATTERN_SIZE}


@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """The repetitions that end a completion; names and meaning are vLLM's.

    Args:
        max_pattern_size: the longest pattern that is looked for, in tokens; 0 looks for none.
        min_pattern_size: the shortest; 0 stands for 1.
        min_count: how often a pattern is repeated in a row, the first time counted: 2 or more.

    Raises:
        SamplingParamsError: a value outside its range.
    """

    SCHEMA: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {
            "max_pattern_size": _SIZE,
            "min_pattern_size": _SIZE,
            "min_count": {"type": "integer", "minimum": 0},
        },
        "additionalProperties": False,
    }

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            value = getattr(self, name)
            most = None if name == "min_count" else MAX_PATTERN_SIZE
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not whole or (most is not None and value > most):
                limit = "0 or more" if most is None else f"between 0 and {most}"
                raise _refused(f"{name} is {shown(value)}; it must be an integer {limit}")
        if self.min_pattern_size > self.max_pattern_size:
            raise _refused(
                f"min_pattern_size is {self.min_pattern_size}; it must not be above "
                f"max_pattern_size ({self.max_pattern_size})"
            )
        if self.max_pattern_size and self.min_count < 2:
            raise _refused(
                f"min_count is {shown(self.min_count)}; it must be at least 2 where "
                "max_pattern_size is not 0"
            )

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Return whether the tokens end with a pattern that is repeated often enough."""
        sizes = range(max(1, self.min_pattern_size), self.max_pattern_size + 1)
        for size in sizes:
            span = size * (self.min_count - 1)
            if span + size > len(token_ids):
                return False
            # a repetition equals itself moved by one pattern
            if (
                token_ids[-1] == token_ids[-1 - size]
                and token_ids[-span - size : -size] == token_ids[-span:]
            ):
                return True
        return False


def _refused(message: str) -> SamplingParamsError:
    error = SamplingParamsError(f"repetition_detection.{message}")
    error.param = "repetition_detection"
    return error
