"""The sequences of one step: most are counted, and only those in which more happens are visited."""

from __future__ import annotations

import numpy as np

from spectral_paged.cache.plan import StepPlan
from spectral_paged.cache.row_counts import Array
from spectral_paged.cache.sequences import SequenceState, SequenceTable
from spectral_paged.cache.stats import CacheCounters


class StepSequences:
    """The sequences of a step, from before it begins until it has ended.

    Args:
        plan: the step's plan.
        table: the sequences of the cache.

    Attributes:
        states, rows: the sequences in the order of the plan, and their rows of the tables.
    """

    def __init__(self, plan: StepPlan, table: SequenceTable) -> None:
        batch, self._counts = table.batch(plan.seq_ids), table.counts
        self.states, self.rows = batch.states, batch.rows
        self._num_new = plan.counts
        self._shortened: Array | None = None
        num_tokens, quiet_until, has_block = self._counts.all[:, batch.rows]
        self._is_busy = num_tokens >= quiet_until
        if plan.drafted is not None or not plan.is_decode:
            self._is_busy |= plan.counts != 1
        self._to_visit = self._is_busy | (has_block > 0)

    def _of(self, mask: Array) -> list[SequenceState]:
        """The sequences of a mask, bool `[N]`, that are still held."""
        found = [self.states[place] for place in mask.nonzero()[0].tolist()]
        return [state for state in found if not state.removed]

    def visited(self) -> list[SequenceState]:
        """Those in which more than counts may change, or whose next block may be sealed."""
        return self._of(self._to_visit)

    def gone(self) -> Array | None:
        """True for each sequence that was freed since the step began, bool `[N]`; None: none."""
        removed = [state.removed for state in self.states]
        return np.array(removed) if True in removed else None

    def store(self, gone: Array | None, counters: CacheCounters) -> None:
        """Count the step's tokens as stored, of all sequences that are not `gone`."""
        quiet = ~self._is_busy if gone is None else ~(self._is_busy | gone)
        self._counts.num_tokens[self.rows[quiet]] += 1
        for place in self._is_busy.nonzero()[0].tolist():
            state = self.states[place]
            if state.removed:
                continue
            if not state.ran:
                counters.count_prefix(state)
            state.store(int(self._num_new[place]))

    def shorten(self, plan: StepPlan) -> None:
        """Store as many tokens as `plan` says, which is the step's, with fewer of some."""
        self._shortened = plan.counts < self._num_new
        self._num_new = plan.counts

    def trim(self) -> None:
        """Release what was reserved for tokens that `shorten` took from the step."""
        if self._shortened is not None:
            for state in self._of(self._shortened):
                state.cancel()

    def cancel(self) -> None:
        """Release what was reserved for the step."""
        for state in self._of(self._is_busy):
            state.cancel()
