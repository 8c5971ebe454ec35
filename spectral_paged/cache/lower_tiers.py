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

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.load import Load
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.prefix_hit import longest_hit, prefix_chain
from spectral_paged.cache.records import Record, Records
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.cache.visibility import Visibility
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat
from spectral_paged.store import DiskTier, HostRecord, HostTier, Tiers

MAX_LOADS = 4  # requests whose prefixes come at a time
MAX_KNOWN_CHAINS = 1024
MAX_NOTED = 1024  # parts of sequences that wait to be written


@dataclass(slots=True)
class _Progress:
    """What of a sequence is written: `num_runs` runs, and the anchors that are no longer in
    `anchors` (tokens before each, ascending). `broken`: a record is missing, so later ones are of
    no use. `complete`: nothing will be added."""

    anchors: list[int]
    num_runs: int = 0
    broken: bool = False
    complete: bool = False


@dataclass(slots=True, eq=False)
class _Noted:
    """Runs and anchors of a sequence that are to be written."""

    state: SequenceState
    progress: _Progress
    runs: range
    anchors: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Asking:
    """A request that is to be admitted, and asks for its prefix."""

    seq_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    cache_salt: str
    pinned: tuple[int, ...]
    format: PageFormat

    def chain(self) -> PrefixChain:
        return prefix_chain(
            self.format, self.token_ids, self.num_prompt_tokens, self.cache_salt, self.pinned
        )

    def is_of(self, other: Asking, num_tokens: int) -> bool:
        """True if both have the same chain; `num_tokens` are those of `other` when it was made."""
        same = self.token_ids is other.token_ids and len(self.token_ids) == num_tokens
        return same and (self.cache_salt, self.pinned, self.format) == (
            other.cache_salt,
            other.pinned,
            other.format,
        )


@dataclass(slots=True)
class _Asked:
    """An answer that holds until something changes, because a request may ask in every step.

    Attributes:
        ready_at: what was written and evicted when the pool had all that could be had.
        num_freed: sequences freed when there was no room.
        queued: True if it needs a load and others were in the way.
    """

    by: Asking
    num_tokens: int
    chain: PrefixChain
    ready_at: tuple[int, int] | None = None
    num_freed: int | None = None
    queued: bool = False


class LowerTiers:
    """The tiers below a cache's pool, and the copies between them and the pool.

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
        self._groups = groups
        self._records = records
        self._visibility = visibility
        self._all = tiers
        self.keeps = tiers is not None
        self._progress: dict[SequenceState, _Progress] = {}
        self._noted: list[_Noted] = []
        self._loads: dict[str, Load] = {}
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._num_freed = 0

    @property
    def tiers(self) -> tuple[HostTier | DiskTier[HostRecord], ...]:
        """The tiers, the fastest first."""
        return () if self._all is None else self._all.all

    @property
    def _tiers(self) -> Tiers:
        assert self._all is not None, "nothing is asked of no tier"
        return self._all

    # ---- write behind --------------------------------------------------------------------

    def step_ended(self, states: Sequence[SequenceState]) -> None:
        """Write what was complete a step ago, whose checks for NaN are known by now, and note what
        the sequences of the step that ends have complete. Needs tiers (`keeps`)."""
        self._write_noted()
        self._note(states)
        if not self._records.seals:  # nothing waits for a check
            self._write_noted()

    def _note(self, states: Sequence[SequenceState]) -> None:
        for state in states:
            chain = state.chain
            if chain is None or state.error is not None:
                continue
            progress = self._progress.get(state)
            if progress is None:
                progress = self._progress[state] = self._begin(state, chain)
                self._asked.pop(state.seq_id, None)  # it runs, so it asks no more
            if progress.broken or progress.complete:
                continue
            complete = self._complete_runs(state, chain)
            anchors = self._complete_anchors(state, progress)
            if complete > progress.num_runs or anchors:
                if len(self._noted) >= MAX_NOTED:  # copies never keep up with what is computed
                    progress.complete = True
                    self._tiers.host.counters.dropped += 1
                    continue
                runs = range(progress.num_runs, complete)
                self._noted.append(_Noted(state, progress, runs, anchors))
                progress.num_runs = max(complete, progress.num_runs)
            if self._records.seals and not progress.anchors:
                progress.complete = complete == self._records.num_runs(state.num_prompt_tokens)

    def _begin(self, state: SequenceState, chain: PrefixChain) -> _Progress:
        """The anchors that a sequence is to write: at the end of its prompt, and at the end of what
        another prompt has in common with it, because requests to come go on there."""
        known = 0
        most = self._records.num_runs(state.num_prompt_tokens)
        while known < most:
            run = self._records.run(chain, known, state.pinned)
            if run is None or not self._tiers.is_known(run.key, run.parent):
                break
            known += 1
        points = self._records.hit_points(state.num_prompt_tokens - 1)
        anchors: list[int] = []
        for point in points:
            if not anchors:
                anchors.append(point)
            if point <= self._records.num_tokens(known):
                anchors.append(point)
                break
        return _Progress(sorted(set(anchors)))

    def _complete_runs(self, state: SequenceState, chain: PrefixChain) -> int:
        if self._records.seals:  # only prompts, because generated tokens have keys of their own
            prompt = self._records.num_runs(state.num_prompt_tokens)
            return min(state.visible_blocks(), prompt)
        return self._records.num_runs(min(state.num_tokens, EXACT_PAGE_TOKENS * len(chain)))

    def _complete_anchors(self, state: SequenceState, progress: _Progress) -> list[int]:
        """The anchors whose tokens are there now; those that the sequence passed are dropped."""
        if not progress.anchors or state.num_tokens < progress.anchors[0]:
            return []
        exactly = self._records.seals  # else pages that left a window are still cached
        found = [n for n in progress.anchors if n <= state.num_tokens]
        progress.anchors = [n for n in progress.anchors if n > state.num_tokens]
        return [n for n in found if n == state.num_tokens or not exactly]

    def _write_noted(self) -> None:
        self._noted = self._write(self._noted)

    def _write(self, noted: Sequence[_Noted]) -> list[_Noted]:
        """Begin to write; returns what has to wait, because too much is on its way already."""
        for place, item in enumerate(noted):
            if not self._is_begun(item):
                return list(noted[place:])
        return []

    def _is_begun(self, noted: _Noted) -> bool:
        """Begin to write, as far as may be; True if nothing is left to begin."""
        state, progress = noted.state, noted.progress
        if state.chain is None or state.error is not None:
            return True
        while not progress.broken and (noted.runs or noted.anchors):
            if self._tiers.host.is_crowded:
                return False
            if noted.runs:
                number, noted.runs = noted.runs[0], noted.runs[1:]
                record = self._records.run(state.chain, number, state.pinned)
                progress.broken = record is None or not self._save(record)
            else:
                point = noted.anchors.pop(0)
                self._save(self._records.anchor(state.chain, point, state.pinned))
        return True

    def _save(self, record: Record) -> bool:
        if not record.parts:
            return True
        if self._tiers.is_known(record.key, record.parent):
            self._tiers.use([(record.key, record.parent)])
            return True
        views = []
        for part in record.parts:
            arena = self._groups[part.place].arena
            slot = arena.slots.lookup(part.slot_key)
            if slot is None:  # evicted meanwhile
                self._tiers.host.counters.dropped += 1
                return False
            views.append(arena.span(slot, part.kind))
        return self._tiers.save(record.key, record.parent, views)

    def freed(self, state: SequenceState, *, forget: bool) -> None:
        """Write what was noted of a sequence that ends now; with `forget` remove what it wrote."""
        if self._all is None:
            return
        own = [item for item in self._noted if item.state is state]
        self._noted = [item for item in self._noted if item.state is not state]
        if not forget:
            self._noted[:0] = self._write(own)
        elif state.chain is not None:
            self._forget(state, state.chain)
        self._progress.pop(state, None)
        self._num_freed += 1
        if not self._progress:  # nothing runs that would take note of copies that arrive
            self._tiers.finish()

    def _forget(self, state: SequenceState, chain: PrefixChain) -> None:
        for point in self._records.hit_points(EXACT_PAGE_TOKENS * len(chain)):
            self._tiers.forget(*self._records.anchor_keys(chain, point))
        for number in range(self._records.num_runs(EXACT_PAGE_TOKENS * len(chain))):
            record = self._records.run(chain, number, state.pinned)
            if record is not None:
                self._tiers.forget(record.key, record.parent)

    # ---- read ahead ----------------------------------------------------------------------

    def prefetch(self, asking: Asking, *, alone: bool) -> bool | None:
        """Bring the prefix of a request; see `SpectralKVCache.prefetch`.

        Args:
            alone: the pool holds no sequence.
        """
        seq_id = asking.seq_id
        load = self._loads.get(seq_id)
        if self._all is None:
            return True
        if self._noted and not self._progress:  # nothing runs, so no step would go on with it
            self._write_noted()
        if load is None:
            asked = self._ask(asking)
            if asked.queued and len(self._loads) >= MAX_LOADS:
                return False
            if asked.ready_at == self._now:
                return True
            if asked.num_freed == self._num_freed and not (alone and not self._loads):
                return None
            needed = self._find(asked)
            asked.queued = bool(needed) and len(self._loads) >= MAX_LOADS
            if asked.queued:
                return False
            if not needed:
                asked.ready_at = self._now
                return True
            load = self._loads[seq_id] = Load(self._groups, self._records, self._tiers, needed)
        ready = load.advance()
        if ready is None:
            return self._no_room(seq_id, alone=alone)
        return ready

    def _no_room(self, seq_id: str, *, alone: bool) -> bool | None:
        self._loads.pop(seq_id).end()
        if alone and not self._loads:
            return True  # it never gets more room than this
        if seq_id in self._asked:
            self._asked[seq_id].num_freed = self._num_freed
        return None

    def _ask(self, asking: Asking) -> _Asked:
        seq_id = asking.seq_id
        asked = self._asked.get(seq_id)
        if asked is None or not asking.is_of(asked.by, asked.num_tokens):
            num_tokens = len(asking.token_ids)
            asked = self._asked[seq_id] = _Asked(asking, num_tokens, asking.chain())
            if len(self._asked) > MAX_KNOWN_CHAINS:
                self._asked.popitem(last=False)
        return asked

    @property
    def _now(self) -> tuple[int, int]:
        """A pair that changes when a record has come to a tier, or the pool loses a slot."""
        return self._tiers.version, sum(group.arena.slots.num_evicted for group in self._groups)

    def _find(self, asked: _Asked) -> list[Record]:
        """The records of the longest prefix that the tiers have, if it is longer than the pool's;
        otherwise none."""
        chain, pinned = asked.chain, asked.by.pinned
        most = min(EXACT_PAGE_TOKENS * len(chain), asked.by.num_prompt_tokens - 1)
        if not self._records.seals:  # generated tokens are like others
            most = EXACT_PAGE_TOKENS * len(chain)
        runs: list[Record] = []
        for number in range(self._records.num_runs(most)):
            run = self._records.run(chain, number, pinned)
            if run is None or not self._is_here(run):
                break
            runs.append(run)
        for point in self._records.hit_points(most):
            num_runs = self._records.runs_before(point)
            if num_runs > len(runs):
                continue
            anchor = self._records.anchor(chain, point, pinned)
            if self._is_here(anchor):
                found = [record for record in (*runs[:num_runs], anchor) if record.parts]
                return found if point > self._in_pool(asked) else []
        return []

    def _is_here(self, record: Record) -> bool:
        """True if the pool has all of a record, or a tier has it."""
        in_pool = all(
            self._groups[part.place].arena.slots.lookup(part.slot_key) is not None
            for part in record.parts
        )
        return in_pool or self._tiers.where(record.key, record.parent) is not None

    def _in_pool(self, asked: _Asked) -> int:
        """The tokens of the longest prefix that the pool has."""
        slots = [group.probe(asked.by.pinned) for group in self._groups]
        hit, _ = longest_hit(self._visibility, slots, asked.chain, asked.by.num_prompt_tokens)
        return hit

    def cancel(self, seq_id: str) -> None:
        """Forget a request that will not be admitted."""
        self._asked.pop(seq_id, None)
        load = self._loads.pop(seq_id, None)
        if load is not None:
            load.end()

    def admitted(self, state: SequenceState) -> None:
        """A sequence has attached its prefix hit, which nobody else needs to keep any more."""
        load = self._loads.pop(state.seq_id, None)
        if load is not None:
            if not load.failed and state.num_cached_tokens >= load.num_tokens.total():
                state.cached_below = dict(load.num_tokens)
            load.end()

    def give_way(self) -> bool:
        """Give up loads, whose slots a running sequence needs; False if there are none."""
        loads = list(self._loads)
        for seq_id in loads:
            self._no_room(seq_id, alone=False)
        return bool(loads)

    # ---- the whole -----------------------------------------------------------------------

    def forget_all(self) -> None:
        """Remove every record, and those that are on their way."""
        for seq_id in list(self._loads):
            self.cancel(seq_id)
        self._noted.clear()
        if self._all is not None:
            self._all.forget_all()

    def close(self) -> None:
        """Write to disk what is to be written, and give all memory and threads of the tiers back.
        Nothing is kept from now on."""
        for seq_id in list(self._loads):
            self.cancel(seq_id)
        self._noted.clear()
        self._asked.clear()
        self._progress.clear()
        if self._all is not None:
            self._all.close()
        self._all, self.keeps = None, False

    def check_integrity(self) -> None:
        """Raise PoolError unless every tier's records and memory agree."""
        if self._all is not None:
            self._all.check_integrity()
