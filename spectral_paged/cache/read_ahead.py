"""Read-ahead brings the prefix of a request from a lower tier before the request is admitted."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.load import Load
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.prefix_hit import longest_hit, prefix_chain
from spectral_paged.cache.records import Record, Records
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.cache.visibility import Visibility
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat
from spectral_paged.store import Tiers

MAX_LOADS = 4  # requests whose prefixes come at a time
MAX_KNOWN_CHAINS = 1024


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
        num_rooms: how often room had been made when there was none.
        queued: True if it needs a load and others were in the way.
        looking: a look on disk for its prefix, until that has ended.
        origins: the tier where each record that a load held was found first.
        came: that tier and the tokens of each record that was loaded for it.
    """

    by: Asking
    num_tokens: int
    chain: PrefixChain
    ready_at: tuple[int, int] | None = None
    num_rooms: int | None = None
    queued: bool = False
    looking: Future[None] | None = None
    origins: dict[bytes, str] = field(default_factory=dict)
    came: dict[bytes, tuple[str, int]] = field(default_factory=dict)


class ReadAhead:
    """The prefixes of waiting requests, on their way from the tiers below the pool into its slots.

    Args:
        groups: the cache's layer groups.
        records: the records of its sequences.
        visibility: the rule for the blocks that queries see as pages.
        tiers: host memory and disk.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        records: Records,
        visibility: Visibility,
        tiers: Tiers,
    ) -> None:
        self._groups = groups
        self._records = records
        self._visibility = visibility
        self._tiers = tiers
        self._loads: dict[str, Load] = {}
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._num_rooms = 0  # how often slots came free that a load may need

    def prefetch(self, asking: Asking, *, alone: bool) -> bool | None:
        """Bring the prefix of a request; see `SpectralKVCache.prefetch` for what is returned.

        Args:
            alone: the pool holds no sequence.
        """
        seq_id = asking.seq_id
        load = self._loads.get(seq_id)
        if load is None:
            asked = self._ask(asking)
            if not self._has_looked(asked):
                return False
            if asked.queued and len(self._loads) >= MAX_LOADS:
                return False
            if asked.ready_at == self._now:
                return True
            if asked.num_rooms == self._num_rooms and not (alone and not self._loads):
                return None
            needed = self._find(asked)
            asked.queued = bool(needed) and len(self._loads) >= MAX_LOADS
            if asked.queued:
                return False
            if not needed:
                asked.ready_at = self._now
                return True
            load = self._loads[seq_id] = Load(
                self._groups, self._records, self._tiers, needed, asked.origins
            )
        ready = load.advance()
        if ready is None:
            return self._no_room(seq_id, alone=alone)
        return ready

    def _no_room(self, seq_id: str, *, alone: bool) -> bool | None:
        self._end(seq_id)
        if alone and not self._loads:
            return True  # it never gets more room than this
        if seq_id in self._asked:
            self._asked[seq_id].num_rooms = self._num_rooms
        return None

    def _ask(self, asking: Asking) -> _Asked:
        seq_id = asking.seq_id
        asked = self._asked.get(seq_id)
        if asked is None or not asking.is_of(asked.by, asked.num_tokens):
            num_tokens = len(asking.token_ids)
            asked = self._asked[seq_id] = _Asked(asking, num_tokens, asking.chain())
            asked.looking = self._tiers.look(self._not_in_pool(asked))
            if len(self._asked) > MAX_KNOWN_CHAINS:
                self._asked.popitem(last=False)
        return asked

    def _has_looked(self, asked: _Asked) -> bool:
        if asked.looking is not None and asked.looking.done():
            asked.looking = None
        return asked.looking is None

    def _not_in_pool(self, asked: _Asked) -> Iterator[tuple[bytes, bytes | None]]:
        """All records that the prefix of a request may have and that the pool has not, each by its
        key and its parent's."""
        most = self._longest(asked)
        runs = (
            self._records.run(asked.chain, number, asked.by.pinned)
            for number in range(self._records.num_runs(most))
        )
        anchors = (
            self._records.anchor(asked.chain, point, asked.by.pinned)
            for point in self._records.hit_points(most)
        )
        for record in (*runs, *anchors):
            if record is not None and not self._is_in_pool(record):
                yield record.key, record.parent

    @property
    def _now(self) -> tuple[int, int]:
        """A pair that changes when a record has come to a tier, or the pool loses a slot."""
        return self._tiers.version, sum(group.arena.slots.num_evicted for group in self._groups)

    def _find(self, asked: _Asked) -> list[Record]:
        """The records of the longest prefix that the tiers have, if it is longer than the pool's;
        otherwise none."""
        chain, pinned, most = asked.chain, asked.by.pinned, self._longest(asked)
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

    def _longest(self, asked: _Asked) -> int:
        """The most tokens that a prefix of a request may have."""
        if not self._records.seals:  # generated tokens are like others
            return EXACT_PAGE_TOKENS * len(asked.chain)
        return min(EXACT_PAGE_TOKENS * len(asked.chain), asked.by.num_prompt_tokens - 1)

    def _is_here(self, record: Record) -> bool:
        """True if the pool has all of a record, or a tier has it."""
        return self._is_in_pool(record) or self._tiers.where(record.key) is not None

    def _is_in_pool(self, record: Record) -> bool:
        return all(
            self._groups[part.place].arena.slots.lookup(part.slot_key) is not None
            for part in record.parts
        )

    def _in_pool(self, asked: _Asked) -> int:
        """The tokens of the longest prefix that the pool has."""
        slots = [group.probe(asked.by.pinned) for group in self._groups]
        hit, _ = longest_hit(self._visibility, slots, asked.chain, asked.by.num_prompt_tokens)
        return hit

    def cancel(self, seq_id: str) -> None:
        """Forget a request that will not be admitted."""
        self._asked.pop(seq_id, None)
        if seq_id in self._loads:
            self._end(seq_id)
            self.room_made()

    def _end(self, seq_id: str) -> None:
        """End a load, and keep in mind what came by it."""
        load = self._loads.pop(seq_id)
        if seq_id in self._asked:
            self._asked[seq_id].came |= load.came
        load.end()

    def admitted(self, state: SequenceState) -> None:
        """A sequence has attached its prefix hit, which nobody else needs to keep any more."""
        load = self._loads.get(state.seq_id)
        if load is not None:
            self._end(state.seq_id)
            if load.failed:  # what came is nobody's
                self.room_made()
        asked = self._asked.get(state.seq_id)
        came: Counter[str] = Counter()
        for tier, num_tokens in asked.came.values() if asked is not None else ():
            came[tier] += num_tokens
        if state.num_cached_tokens >= came.total():
            state.cached_below = dict(came)

    def began(self, states: Sequence[SequenceState]) -> None:
        """Forget requests that run now, and so ask no more."""
        for state in states:
            self._asked.pop(state.seq_id, None)

    def room_made(self) -> None:
        """Slots came free, so that those for whom there was no room ask again."""
        self._num_rooms += 1

    def give_way(self) -> bool:
        """Give up loads, whose slots a running sequence needs; False if there are none."""
        loads = list(self._loads)
        for seq_id in loads:
            self._no_room(seq_id, alone=False)
        return bool(loads)

    def give_up(self) -> None:
        """Forget all loads, and that there was no room."""
        for seq_id in list(self._loads):
            self.cancel(seq_id)
        self.room_made()
