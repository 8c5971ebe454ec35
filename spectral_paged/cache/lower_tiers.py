"""Sealed prompts outlive their slots: they are written to tiers below the pool, and come back.

```
end_step    runs and anchors that were complete a step ago begin their copies, because their pages
            are checked by now; those that are complete now are noted
admission   the longest known prefix begins to come into slots of the pool; other sequences run
            meanwhile, and the request is admitted once it is there
```

A prefix that came back is cached in the pool like any other: admission finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.read_ahead import Asking, ReadAhead
from spectral_paged.cache.records import Records
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.cache.visibility import Visibility
from spectral_paged.cache.write_behind import WriteBehind
from spectral_paged.store import DiskTier, HostRecord, HostTier, Tiers


@dataclass(frozen=True, slots=True, eq=False)
class _Moves:
    """What moves between the pool and the tiers below it."""

    tiers: Tiers
    behind: WriteBehind
    ahead: ReadAhead


class LowerTiers:
    """The tiers below a cache's pool, if there are any, and what moves between them and the pool.

    Args:
        groups: the cache's layer groups.
        records: the records of its sequences.
        visibility: the rule for the blocks that queries see as pages.
        tiers: host memory and disk; None: nothing is kept, and every call returns at once.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        records: Records,
        visibility: Visibility,
        tiers: Tiers | None,
    ) -> None:
        self.moves: _Moves | None = None
        if tiers is not None:
            behind = WriteBehind(groups, records, tiers)
            ahead = ReadAhead(groups, records, visibility, tiers)
            self.moves = _Moves(tiers, behind, ahead)

    @property
    def tiers(self) -> tuple[HostTier | DiskTier[HostRecord], ...]:
        """The tiers, the fastest first."""
        return () if self.moves is None else self.moves.tiers.all

    # ---- a sequence, from the question for its prefix to its end -------------------------

    def prefetch(self, asking: Asking, *, alone: bool) -> bool | None:
        """Bring the prefix of a request; see `ReadAhead.prefetch`."""
        if self.moves is None:
            return True
        if self.moves.behind.is_idle:  # no step would go on with what is noted
            self.moves.behind.go_on()
        return self.moves.ahead.prefetch(asking, alone=alone)

    def cancel(self, seq_id: str) -> None:
        """Forget a request that will not be admitted."""
        if self.moves is not None:
            self.moves.ahead.cancel(seq_id)

    def admitted(self, state: SequenceState) -> None:
        """A sequence has attached its prefix hit, which nobody else needs to keep any more."""
        if self.moves is not None:
            self.moves.ahead.admitted(state)

    def step_ended(self, states: Sequence[SequenceState]) -> None:
        """Write what was complete a step ago, and note what is complete now."""
        if self.moves is not None:
            self.moves.ahead.began(self.moves.behind.step_ended(states))

    def give_way(self) -> bool:
        """Give up loads, whose slots a running sequence needs; False if there are none."""
        return self.moves is not None and self.moves.ahead.give_way()

    def give_up(self) -> None:
        """Give up loads, because the pool is emptied; requests ask anew."""
        if self.moves is not None:
            self.moves.ahead.give_up()

    def freed(self, state: SequenceState, *, forget: bool) -> None:
        """Write what was noted of a sequence that ends now; with `forget` remove what it wrote."""
        if self.moves is not None:
            self.moves.behind.freed(state, forget=forget)
            self.moves.ahead.room_made()

    def finish(self) -> None:
        """Write what is complete, and wait until the lowest tier has it."""
        if self.moves is not None:
            self.moves.behind.finish()

    # ---- the whole -----------------------------------------------------------------------

    def forget_all(self) -> None:
        """Remove every record, and those that are on their way."""
        if self.moves is not None:
            self.moves.ahead.give_up()
            self.moves.behind.drop()
            self.moves.tiers.forget_all()

    def close(self, check: Callable[[], object]) -> None:
        """Write to disk what is to be written, and give all memory and threads of the tiers back.
        Nothing is kept from now on.

        Args:
            check: makes known which blocks have NaN.
        """
        if self.moves is not None:
            self.moves.ahead.give_up()
            if self.moves.tiers.disk is not None:  # else nothing outlives this
                check()
                self.finish()
            self.moves.tiers.close()
        self.moves = None

    def check_integrity(self) -> None:
        """Raise PoolError unless every tier's records and memory agree."""
        if self.moves is not None:
            self.moves.tiers.check_integrity()
