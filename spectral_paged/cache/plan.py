"""The plan of a step lists its sequences and tokens; the report lists failed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spectral_paged.errors import NonFiniteError, PoolError, shown

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
        drafted: bool `[N]`, True for each sequence whose tokens after its first one are a draft;
            None: there are none. A draft's tokens attend one by one, as decoded tokens do.
        is_decode: True if every token attends so: each sequence has one, or a draft behind it.
    """

    __slots__ = ("counts", "drafted", "is_decode", "num_tokens", "seq_ids", "starts")

    def __init__(
        self,
        seq_ids: list[str],
        starts: Array,
        counts: list[int],
        drafted: Array | None = None,
    ) -> None:
        self.seq_ids, self.starts, self.counts = seq_ids, starts, np.array(counts, np.int64)
        self.num_tokens, self.drafted = sum(counts), drafted
        self.is_decode = counts.count(1) == len(counts)
        if drafted is not None and not self.is_decode:
            self.is_decode = bool((drafted | (self.counts == 1)).all())

    @property
    def entries(self) -> tuple[PlanEntry, ...]:
        """The plan by sequence."""
        columns = self.seq_ids, self.starts.tolist(), self.counts.tolist()
        return tuple(map(PlanEntry, *columns))

    @property
    def positions(self) -> Array:
        """The position of every token, int64 `[num_tokens]`."""
        if self.num_tokens == len(self.seq_ids):
            return self.starts
        begins = np.cumsum(self.counts) - self.counts  # of each sequence in the flat batch
        return np.arange(self.num_tokens) + np.repeat(self.starts - begins, self.counts)

    def without(self, gone: Array) -> StepPlan:
        """The plan without the sequences of the mask `gone`, bool `[N]`."""
        kept = (~gone).nonzero()[0]
        names = [self.seq_ids[place] for place in kept.tolist()]
        drafted = None if self.drafted is None else self.drafted[kept]
        return StepPlan(names, self.starts[kept], self.counts[kept].tolist(), drafted)

    def shortened(self, counts: Mapping[str, int]) -> StepPlan:
        """The plan without the last `counts[seq_id]` tokens of sequences with a draft.

        Raises:
            PoolError: a sequence has no draft of so many tokens.
        """
        left = self.counts.copy()
        for seq_id, count in counts.items():
            place = self.seq_ids.index(seq_id) if seq_id in self.seq_ids else None
            if place is None or self.drafted is None or not self.drafted[place]:
                raise PoolError(f"sequence {shown(seq_id)} has no draft in this step")
            if not 0 <= count < left[place]:
                raise PoolError(
                    f"{count} tokens of {shown(seq_id)} are to be taken back; its draft has "
                    f"{left[place] - 1}"
                )
            left[place] -= count
        return StepPlan(self.seq_ids, self.starts, left.tolist(), self.drafted)


@dataclass(slots=True)
class StepReport:
    """The result of `end_step`: sequences in `failed` have NaN or Inf, and are to be freed."""

    failed: dict[str, NonFiniteError] = field(default_factory=dict)
