"""Write-behind copies what sequences seal to the tiers below the pool, a step after the seal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.records import Record, Records
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.store import Tiers

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


class WriteBehind:
    """The runs and anchors of running sequences, on their way to the tiers below the pool.

    Args:
        groups: the cache's layer groups.
        records: the records of its sequences.
        tiers: host memory and disk.
    """

    def __init__(self, groups: Sequence[LayerGroup], records: Records, tiers: Tiers) -> None:
        self._groups = groups
        self._records = records
        self._tiers = tiers
        self._progress: dict[SequenceState, _Progress] = {}
        self._noted: list[_Noted] = []

    @property
    def is_idle(self) -> bool:
        """True if no sequence runs whose steps would go on with what is noted."""
        return not self._progress

    def step_ended(self, states: Sequence[SequenceState]) -> list[SequenceState]:
        """Write what was complete a step ago, whose checks for NaN are known by now, and note what
        the sequences of the step that ends have complete; returns those whose first step it was."""
        self.go_on()
        begun = self._note(states)
        if not self._records.seals:  # nothing waits for a check
            self.go_on()
        return begun

    def _note(self, states: Sequence[SequenceState]) -> list[SequenceState]:
        begun = []
        for state in states:
            chain = state.chain
            if chain is None or state.error is not None:
                continue
            progress = self._progress.get(state)
            if progress is None:
                progress = self._progress[state] = self._begin(state, chain)
                begun.append(state)
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
        return begun

    def _begin(self, state: SequenceState, chain: PrefixChain) -> _Progress:
        """The anchors that a sequence is to write: at the end of its prompt, and at the end of what
        another prompt has in common with it, because requests to come go on there."""
        known = 0
        most = self._records.num_runs(state.num_prompt_tokens)
        while known < most:
            run = self._records.run(chain, known, state.pinned)
            if run is None or not self._tiers.is_known(run.key):
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

    def go_on(self) -> None:
        """Begin to write what is noted."""
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
        if self._tiers.is_known(record.key):
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
        own = [item for item in self._noted if item.state is state]
        self._noted = [item for item in self._noted if item.state is not state]
        if not forget:
            self._noted[:0] = self._write(own)
        elif state.chain is not None:
            self._forget(state, state.chain)
        self._progress.pop(state, None)
        if self.is_idle:  # nothing runs that would take note of copies that arrive
            self._tiers.finish()

    def _forget(self, state: SequenceState, chain: PrefixChain) -> None:
        for point in self._records.hit_points(EXACT_PAGE_TOKENS * len(chain)):
            self._tiers.forget(*self._records.anchor_keys(chain, point))
        for number in range(self._records.num_runs(EXACT_PAGE_TOKENS * len(chain))):
            record = self._records.run(chain, number, state.pinned)
            if record is not None:
                self._tiers.forget(record.key, record.parent)

    def finish(self) -> None:
        """Write all that is noted, and wait until the lowest tier has it, however long it takes."""
        self._tiers.drain()
        while self._noted:
            self.go_on()
            self._tiers.drain()

    def drop(self) -> None:
        """Forget what is noted."""
        self._noted.clear()
