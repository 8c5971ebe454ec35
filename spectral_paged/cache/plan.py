"""The plan of a step lists its sequences and tokens; the report lists failed sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spectral_paged.errors import NonFiniteError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """`num_new` tokens of one sequence, the first of them at position `start`."""

    seq_id: str
    start: int
    num_new: int


class StepPlan:
    """The tokens that one step computes, in the order in which q, k and v are flattened.

    Attributes:
        seq_ids: the sequences in that order.
        starts, counts: int64 `[N]`, the position of each one's first token, and their number.
        num_tokens: the number of all of them.
        is_decode: True if every sequence has one new token.
    """

    __slots__ = ("counts", "is_decode", "num_tokens", "seq_ids", "starts")

    def __init__(self, seq_ids: list[str], starts: Array, counts: list[int]) -> None:
        self.seq_ids, self.starts, self.counts = seq_ids, starts, np.array(counts, np.int64)
        self.num_tokens = sum(counts)
        self.is_decode = counts.count(1) == len(counts)

    @property
    def entries(self) -> tuple[PlanEntry, ...]:
        """The plan by sequence."""
        columns = self.seq_ids, self.starts.tolist(), self.counts.tolist()
        return tuple(map(PlanEntry, *columns))

    @property
    def positions(self) -> Array:
        """The position of every token, int64 `[num_tokens]`."""
        if self.is_decode:
            return self.starts
        begins = np.cumsum(self.counts) - self.counts  # of each sequence in the flat batch
        return np.arange(self.num_tokens) + np.repeat(self.starts - begins, self.counts)

    def without(self, gone: Array) -> StepPlan:
        """The plan without the sequences of the mask `gone`, bool `[N]`."""
        kept = (~gone).nonzero()[0]
        names = [self.seq_ids[place] for place in kept.tolist()]
        return StepPlan(names, self.starts[kept], self.counts[kept].tolist())


@dataclass(slots=True)
class StepReport:
    """The result of `end_step`: sequences in `failed` have NaN or Inf, and are to be freed."""

    failed: dict[str, NonFiniteError] = field(default_factory=dict)
