"""A load brings the records of one request's prefix from a lower tier into slots of the pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spectral_paged.cache.borrowed_slots import BorrowedSlots
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.records import Part, Record, Records
from spectral_paged.pool.weak_method import WeakMethod
from spectral_paged.store import Copy, HostRecord, Tiers

MAX_BYTES_ON_WAY = 256 << 20  # of a load's copies, which take as much of the device's memory


@dataclass(slots=True, eq=False)
class _Arriving:
    """A record whose copy began: the borrowed slots of its parts, by place and index."""

    record: Record
    tier: str
    copy: Copy
    source: HostRecord
    slots: list[tuple[Part, int]]


class Load:
    """The records that a prefix needs and the pool lacks, on their way into borrowed slots.

    Slots that the pool has already are borrowed too, so that none is evicted meanwhile.

    Args:
        groups: the cache's layer groups.
        records: the records of the cache's sequences.
        tiers: they have the records.
        needed: all records of the prefix.
        origins: the tier where each record was found first; a later load of the same request finds
            in host memory what an earlier one had read from disk.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        records: Records,
        tiers: Tiers,
        needed: Sequence[Record],
        origins: dict[bytes, str],
    ) -> None:
        self._groups = groups
        self._records = records
        self._tiers = tiers
        self._origins = origins
        self._borrowed = [BorrowedSlots(group.arena, WeakMethod(self._settle)) for group in groups]
        self._waiting: deque[Record] = deque()
        self._coming: deque[tuple[Record, str, HostRecord]] = deque()  # in host memory, or coming
        self._arriving: list[_Arriving] = []
        self.failed = False
        self.came: dict[bytes, tuple[str, int]] = {}  # the tier and the tokens of each record
        for group, borrowed in zip(groups, self._borrowed, strict=True):
            group.borrowed.append(borrowed)
        for record in needed:
            found = [self._acquire(part) for part in record.parts]
            if not all(found):
                self._waiting.append(record)
        tiers.use([(record.key, record.parent) for record in needed])
        self._call()

    def _acquire(self, part: Part) -> bool:
        return self._borrowed[part.place].acquire(part.slot_key)

    def advance(self) -> bool | None:
        """Begin further copies and publish what has come: True once everything is there or the load
        has `failed`, False while something is on its way, None if the pool has no room now."""
        self._call()
        on_way = sum([item.source.num_bytes for item in self._arriving if not item.copy.is_done])
        while self._coming and not self.failed and on_way < MAX_BYTES_ON_WAY:
            record, tier, source = self._coming[0]
            if not source.copy.is_done:
                break
            num_bytes = self._begin(record, tier, source)
            if num_bytes is None:
                return None
            self._coming.popleft()
            on_way += num_bytes
        arrived = [item for item in self._arriving if item.copy.is_done]
        self._arriving = [item for item in self._arriving if item not in arrived]
        for item in arrived:
            self._tiers.let_go(item.source)
            self.came[item.record.key] = item.tier, item.record.num_tokens
            for part, index in item.slots:
                self._borrowed[part.place].publish(index, part.slot_key)
        return self.failed or not (self._waiting or self._coming or self._arriving)

    def _call(self) -> None:
        """Hold what is in host memory, and have what is on disk read there, as long as it has
        room."""
        while self._waiting and not self.failed:
            record = self._waiting[0]
            tier = self._tiers.where(record.key) or self._tiers.host.name
            try:
                source = self._tiers.hold(record.key, record.parent)
            except KeyError:  # evicted meanwhile
                self.failed = True
                return
            if source is None:
                return
            self._waiting.popleft()
            self._coming.append((record, self._origins.setdefault(record.key, tier), source))

    def _begin(self, record: Record, tier: str, source: HostRecord) -> int | None:
        """Begin a record's copy and return its bytes; None: not now."""
        slots: list[tuple[Part, int]] = []
        places: list[tuple[Part, int | None]] = []
        for part in record.parts:
            index = None
            if not self._acquire(part):  # else it is borrowed already, or was computed meanwhile
                index = self._borrowed[part.place].allocate(part.kind)
                if index is None:
                    return None
                slots.append((part, index))
            places.append((part, index))
        views: list[Tensor | int] = [
            self._records.part_bytes(part)
            if index is None
            else self._groups[part.place].arena.span(
                self._borrowed[part.place].slots[index], part.kind
            )
            for part, index in places
        ]
        copy = None if source.copy.failed else self._tiers.load(source, views)
        if copy is None:
            self.failed = True
            self._tiers.let_go(source)
            return 0
        self._arriving.append(_Arriving(record, tier, copy, source, slots))
        return source.num_bytes

    def _settle(self) -> None:
        for item in self._arriving:
            item.copy.hold()

    def end(self) -> None:
        """Give all slots back. What has come stays cached in the pool."""
        for item in self._arriving:
            item.copy.wait()
            self._tiers.let_go(item.source)
        for _, _, source in self._coming:
            self._tiers.let_go(source)
        self._arriving, self._waiting, self._coming = [], deque(), deque()
        for group, borrowed in zip(self._groups, self._borrowed, strict=True):
            borrowed.release()
            group.borrowed.remove(borrowed)
