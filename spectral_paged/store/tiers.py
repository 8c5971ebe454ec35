"""The tiers below a pool together: host memory, and below it a folder on disk.

Everything passes through host memory. A record that has come there from the device is written to
disk by a thread, and one that is wanted from disk is read there by a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from torch import Tensor

from spectral_paged.store.copies import Copy
from spectral_paged.store.disk_tier import DiskTier
from spectral_paged.store.host_tier import HostRecord, HostTier


class Tiers:
    """The tiers of a cache. One thread calls it, and only `drain` and `close` wait for the disk.

    Records are known to be there because they were looked for, written or read by this process.

    A record's chain is named by its own key and that of the record before it, its parent.

    Args:
        host: the tier in host memory.
        disk: the tier on disk, if there is one.
    """

    def __init__(self, host: HostTier, disk: DiskTier[HostRecord] | None = None) -> None:
        self.host = host
        self.disk = disk
        host.hands_on = disk is not None

    @property
    def all(self) -> tuple[HostTier | DiskTier[HostRecord], ...]:
        """The tiers, the fastest first."""
        return (self.host,) if self.disk is None else (self.host, self.disk)

    @property
    def version(self) -> int:
        """A number that grows when a record has come."""
        self.settle()
        return self.host.version

    def look(self, records: Iterable[tuple[bytes, bytes | None]]) -> Future[None] | None:
        """Begin to look on disk for records, each a key and its parent's, that host memory has not;
        None: there is nothing to look for."""
        wanted = [(key, parent) for key, parent in records if not self.host.is_known(key)]
        return None if self.disk is None or not wanted else self.disk.look(wanted)

    def where(self, key: bytes) -> str | None:
        """The name of the fastest tier that is known to have a record; None if none is."""
        if key in self.host:
            return self.host.name
        if self.disk is not None and self.disk.known_size(key) is not None:
            return self.disk.name
        return None

    def is_known(self, key: bytes) -> bool:
        """True if a tier is known to have a record, or it is on its way to one."""
        return self.host.is_known(key) or self.where(key) is not None

    def use(self, records: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Count records, each by its key and its parent's, as used now."""
        records = list(records)
        self.host.use([key for key, _ in records])
        if self.disk is not None:
            self.disk.use(records)

    def save(self, key: bytes, parent: bytes | None, views: Sequence[Tensor]) -> bool:
        """Begin to write a record; False if it is dropped. See `HostTier.save`."""
        self.settle()
        return self.host.save(key, parent, views)

    def hold(self, key: bytes, parent: bytes | None) -> HostRecord | None:
        """A record in host memory, which stays there until `let_go`. It may be on its way from
        disk, and never come (`copy.failed`). None: there is no room for it now.

        Raises:
            KeyError: no tier has it any more, or it is larger than host memory.
        """
        if self.host.is_known(key):
            return self.host.hold(key)
        size = None if self.disk is None else self.disk.known_size(key)
        if self.disk is None or size is None or not self.host.may_hold(size):
            raise KeyError(key)
        disk = self.disk
        return self.host.receive(key, parent, size, lambda to: disk.read(key, parent, to))

    def load(self, record: HostRecord, views: Sequence[Tensor | int]) -> Copy | None:
        """Begin to copy a record that is held to the device. See `HostTier.load`."""
        return self.host.load(record, views)

    def let_go(self, record: HostRecord) -> None:
        self.host.let_go(record)

    def settle(self) -> None:
        """Take note of what has come and what is written."""
        self.host.settle()
        if self.disk is None:
            return
        for record in self.host.take_arrived():
            kept = self.host.is_known(record.key)  # else it was forgotten meanwhile
            pieces = self.host.pieces(record)
            if not (kept and self.disk.write(record.key, record.parent, pieces, record)):
                self.host.handed_on(record)
        for record in self.disk.take_written():
            self.host.handed_on(record)

    def finish(self) -> None:
        """Wait for what is on its way from the device, so that nothing keeps it from the disk. What
        is read from disk meanwhile is not waited for."""
        if self.disk is not None:
            self.host.wait_for_device()
            self.settle()

    def drain(self) -> None:
        """Wait until nothing is on its way to host memory, and all that came is written to disk."""
        if self.disk is not None:
            self.disk.flush()  # so that what comes now finds its queue empty
        self.host.wait()
        self.settle()
        if self.disk is not None:
            self.disk.flush()
            self.settle()

    def forget(self, key: bytes, parent: bytes | None) -> None:
        """Remove a record from every tier."""
        self.host.forget(key)
        if self.disk is not None:
            self.disk.forget(key, parent)

    def forget_all(self) -> None:
        for tier in self.all:
            tier.forget_all()

    def close(self) -> None:
        """Write what is not written, and give memory and threads back."""
        self.drain()
        if self.disk is not None:
            self.disk.close()
            self.settle()
        self.host.close()

    def check_integrity(self) -> None:
        """Raise PoolError unless the tiers are whole."""
        self.host.check_integrity()
