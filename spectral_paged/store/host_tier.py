"""The tier in host memory: records by key, the least recently used chains given up first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spectral_paged.errors import PoolError
from spectral_paged.store.chain_order import ChainOrder
from spectral_paged.store.copies import Copier, Copy
from spectral_paged.store.counters import TierCounters
from spectral_paged.store.memory import HostMemory

MAX_BYTES_ON_WAY = 256 << 20  # of copies to the host: none begins while so many are not done


@dataclass(slots=True, eq=False)
class HostRecord:
    """A record in host memory.

    copy: how its bytes came there. readers: those who need the bytes to stay. is_new: no tier below
    has it.
    """

    key: bytes
    parent: bytes | None
    frames: list[int]
    num_bytes: int
    copy: Copy
    readers: int = 0
    is_new: bool = True

    @property
    def is_busy(self) -> bool:
        return self.readers > 0 or not self.copy.is_done


class HostTier:
    """Records in host memory of a fixed size.

    One thread uses a tier. Bytes come and go by copies that nobody waits for.

    Args:
        memory: where records lie.
        copier: begins copies between the cache's device and that memory.
    """

    name = "host"
    hands_on = False  # keep what comes from the device for `take_arrived`

    def __init__(self, memory: HostMemory, copier: Copier) -> None:
        self._memory = memory
        self._copier = copier
        self._records: dict[bytes, HostRecord] = {}
        self._order = ChainOrder()
        self._on_way: list[HostRecord] = []  # their copies to the host may not be done
        self._doomed: list[HostRecord] = []  # forgotten, but still read or written
        self._arrived: list[HostRecord] = []  # since `take_arrived`
        self._handing_on: set[HostRecord] = set()  # arrived, and not written by the tier below
        self._num_arrived = 0
        self.counters = TierCounters()

    @property
    def version(self) -> int:
        """A number that grows when a record has come."""
        self.settle()
        return self._num_arrived

    def __contains__(self, key: bytes) -> bool:
        """True if a record is there, whole."""
        record = self._records.get(key)
        return record is not None and record.copy.is_done and not record.copy.failed

    def is_known(self, key: bytes) -> bool:
        """True if a record is there or on its way."""
        return key in self._records

    def use(self, keys: Iterable[bytes]) -> None:
        """Count records as used now."""
        self._order.use(keys)

    @property
    def is_crowded(self) -> bool:
        """True if so much is on its way here, or waits for the tier below, that no other copy may
        begin now."""
        self.settle()
        on_way = sum([record.num_bytes for record in self._on_way])
        waits = sum([record.num_bytes for record in self._handing_on])
        return on_way >= MAX_BYTES_ON_WAY or 2 * (on_way + waits) > self._memory.num_bytes

    def save(self, key: bytes, parent: bytes | None, views: Sequence[Tensor]) -> bool:
        """Begin to copy a record here; False if it is dropped, because the tier `is_crowded`,
        everything here is busy, or the copy cannot be made.

        Args:
            key: of a record that is not known.
            parent: key of the record before it in its chain.
            views: its bytes on the device, which later work of the current stream may overwrite.
        """
        num_bytes = sum(view.numel() for view in views)
        frames = None
        if not self.is_crowded and self.may_hold(num_bytes):
            frames = self._take(self._memory.frames_of(num_bytes), parent)
        if frames is None:
            self.counters.dropped += 1
            return False
        try:
            copy = self._copier.save(views, self._memory.pieces(frames, num_bytes))
        except (RuntimeError, MemoryError, OSError) as error:
            self._memory.give_back(frames)
            self.counters.count_failure("a copy to host memory", error)
            return False
        self._add(HostRecord(key, parent, frames, num_bytes, copy))
        self.counters.written += 1
        self.counters.written_bytes += num_bytes
        return True

    def _add(self, record: HostRecord) -> None:
        self._records[record.key] = record
        self._order.add(record.key, None if self.hands_on else record.parent)
        self._on_way.append(record)

    def receive(
        self,
        key: bytes,
        parent: bytes | None,
        num_bytes: int,
        begin: Callable[[list[Tensor]], Copy],
    ) -> HostRecord | None:
        """A record that comes from a tier below, held as by `hold`; None: there is no room now.

        Args:
            begin: begins to copy its bytes to the tensors that it is given.
        """
        self.settle()
        frames = self._take(self._memory.frames_of(num_bytes), parent)
        if frames is None:
            return None
        copy = begin(self._memory.pieces(frames, num_bytes))
        record = HostRecord(key, parent, frames, num_bytes, copy, readers=1, is_new=False)
        self._add(record)
        return record

    def may_hold(self, num_bytes: int) -> bool:
        """True if a record of so many bytes is not larger than the memory."""
        return self._memory.frames_of(num_bytes) <= self._memory.num_frames

    def pieces(self, record: HostRecord) -> list[Tensor]:
        """The bytes of a record that is held."""
        return self._memory.pieces(record.frames, record.num_bytes)

    def take_arrived(self) -> list[HostRecord]:
        """The records that came from the device since the last call, each held until the caller
        says `handed_on`."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def handed_on(self, record: HostRecord) -> None:
        """The tier below has written a record, or will not."""
        self._handing_on.discard(record)
        self.let_go(record)

    def _take(self, count: int, parent: bytes | None) -> list[int] | None:
        """Frames, for which ends of chains other than `parent`, without which the new record would
        be of no use, are evicted as needed; None if the rest is busy.

        Where a tier below has what is evicted, any record may go, because a chain that is longer
        than this memory has to pass.
        """

        def may_go(key: bytes) -> bool:
            return (self.hands_on or key != parent) and not self._records[key].is_busy

        while (frames := self._memory.take(count)) is None:
            oldest = self._order.oldest(may_go)
            if oldest is None:
                return None
            self.forget(oldest)
            self.counters.evicted += 1
        return frames

    def hold(self, key: bytes) -> HostRecord:
        """Keep a record's bytes until `let_go`, whatever is evicted or forgotten."""
        record = self._records[key]
        record.readers += 1
        return record

    def let_go(self, record: HostRecord) -> None:
        record.readers -= 1
        self.settle()

    def load(self, record: HostRecord, views: Sequence[Tensor | int]) -> Copy | None:
        """Begin to copy a record that is held to `views`, in order; a number skips so many bytes.
        None: the copy cannot be made."""
        try:
            copy = self._copier.load(self._memory.pieces(record.frames, record.num_bytes), views)
        except (RuntimeError, MemoryError, OSError) as error:
            self.counters.count_failure("a copy from host memory", error)
            return None
        self.counters.read += 1
        self.counters.read_bytes += sum(v.numel() for v in views if not isinstance(v, int))
        return copy

    def forget(self, key: bytes) -> None:
        """Remove a record, if it is there."""
        if key in self._records:
            self._forget(key)
            self.settle()

    def _forget(self, key: bytes) -> None:
        self._doomed.append(self._records.pop(key))
        self._order.remove(key)

    def forget_all(self) -> None:
        for key in list(self._records):
            self.forget(key)

    def settle(self) -> None:
        """Take note of the copies that are done."""
        if self._on_way:
            on_way, self._on_way = self._on_way, []
            for record in on_way:
                if not record.copy.is_done:
                    self._on_way.append(record)
                elif not record.copy.failed:
                    self._num_arrived += 1
                    if record.is_new and self.hands_on:
                        record.readers += 1
                        self._arrived.append(record)
                        self._handing_on.add(record)
                elif self._records.get(record.key) is record:
                    self._forget(record.key)
        if self._doomed:
            busy = []
            for record in self._doomed:
                if record.is_busy:
                    busy.append(record)
                else:
                    self._memory.give_back(record.frames)
            self._doomed = busy

    def wait(self) -> None:
        """Wait for the copies on their way here."""
        for record in self._on_way:
            record.copy.wait()

    def wait_for_device(self) -> None:
        """Wait for the copies on their way from the device, and for none from a tier below."""
        for record in self._on_way:
            if record.is_new:
                record.copy.wait()

    def close(self) -> None:
        """Wait for copies on their way, and give the memory back."""
        self.wait()
        self._records, self._doomed, self._on_way, self._arrived = {}, [], [], []
        self._handing_on = set()
        self._order = ChainOrder()
        self._memory.close()

    def stats(self) -> dict[str, int]:
        """The bytes of the tier's memory and of its records, their number, and totals."""
        held = sum(len(record.frames) for record in list(self._records.values()))
        return {
            "capacity_bytes": self._memory.num_bytes,
            "bytes": held * self._memory.frame_bytes,
            "records": len(self._records),
            **self.counters.stats(),
        }

    def check_integrity(self) -> None:
        """Raise PoolError unless every frame is held once or free, and every record can be
        evicted."""
        held = [f for r in (*self._records.values(), *self._doomed) for f in r.frames]
        free = self._memory.num_free
        if len(set(held)) != len(held) or len(held) + free != self._memory.num_frames:
            raise PoolError("host memory: a frame is lost or held twice")
        if set(self._records) != set(self._order):
            raise PoolError("host memory: records and their order differ")
