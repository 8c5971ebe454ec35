"""The tier on disk: records in a folder, read and written by threads."""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, ParamSpec, TypeVar

from torch import Tensor

from spectral_paged.store.counters import TierCounters
from spectral_paged.store.folder import Folder, name_of
from spectral_paged.store.record_file import (
    HEADER_BYTES,
    BadRecordError,
    header,
    read_record,
    write_body,
)

Given = TypeVar("Given")
P = ParamSpec("P")
R = TypeVar("R")
NUM_READERS = 4
MAX_KNOWN = 1 << 18  # records that are remembered as there
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # of a folder that is for reading only
MAX_BYTES_QUEUED = 8 << 30  # of records that wait to be written, in host memory; one always passes


class DiskRead:
    """A record on its way from disk, as a `Copy`; `failed` once it cannot come."""

    def __init__(self, future: Future[bool]) -> None:
        self._future = future

    @property
    def is_done(self) -> bool:
        return self._future.done()

    @property
    def failed(self) -> bool:
        if not self._future.done():
            return False
        if self._future.cancelled() or self._future.exception() is not None:
            return True
        return not self._future.result()

    def wait(self) -> None:
        if not self._future.cancelled():
            self._future.exception()

    def hold(self) -> None:
        self.wait()


class DiskTier(Generic[Given]):
    """Records of one model and format in a folder, which other processes may share.

    A record that is damaged, truncated, foreign or of another version is a miss: the log tells of
    it once, and it is removed. Where the disk is full, the folder for reading only or gone, writes
    fail, which the log tells once, and nothing else happens. Whatever else a thread raises is told
    and counted like that.

    Args:
        folder: the folder.
        identity: 32 bytes that separate the records of models and formats.
    """

    name = "disk"

    def __init__(self, folder: Folder, identity: bytes) -> None:
        self._folder = folder
        self._identity = identity
        self._writer = ThreadPoolExecutor(1, "store-writer")
        self._looker = ThreadPoolExecutor(1, "store-looker")  # waits for no read of a record
        self._readers = ThreadPoolExecutor(NUM_READERS, "store-reader")
        self._queued = 0  # bytes
        self._lock = threading.Lock()  # of counters, which threads change
        self._known: OrderedDict[bytes, int] = OrderedDict()  # bytes of records, as seen last
        self._written: deque[Given] = deque()  # needed no more
        self._used_bytes = 0
        self._num_records = 0
        self.counters = TierCounters()
        self._begin(self._writer, f"counting the store {folder.path}", self._count)

    def _begin(
        self,
        threads: ThreadPoolExecutor,
        what: str,
        job: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[R]:
        """Have a thread do a job; what it raises is counted, and told as a failure of `what`."""
        return threads.submit(self._told, what, partial(job, *args, **kwargs))

    def _told(self, what: str, job: Callable[[], R]) -> R:
        try:
            return job()
        except BaseException as error:  # of any type, because nobody asks the thread for it
            self._failed(what, error)
            raise

    def _failed(self, what: str, error: BaseException, *, where: str = "") -> None:
        with self._lock:
            self.counters.count_failure(what, error, where=where)

    def find(self, key: bytes, parent: bytes | None) -> int | None:
        """The bytes of a record; None if it is not there. It asks the file system, which may take
        any time."""
        size = self._folder.size_of(name_of(self._identity, key, parent))
        found = None if size is None or size <= HEADER_BYTES else size - HEADER_BYTES
        self._note(key, found)
        return found

    def known_size(self, key: bytes) -> int | None:
        """The bytes of a record that was there when it was last written, read or looked for; None
        if it was not. It asks nobody."""
        return self._known.get(key)

    def look(self, records: Sequence[tuple[bytes, bytes | None]]) -> Future[None]:
        """Begin to look for records, a key and its parent's each; `known_size` then has them."""
        return self._begin(self._looker, self._reading, self._look, records)

    @property
    def _reading(self) -> str:
        return f"reading the store {self._folder.path}"

    @property
    def _writing(self) -> str:
        return f"writing to the store {self._folder.path}"

    def _look(self, records: Sequence[tuple[bytes, bytes | None]]) -> None:
        for key, parent in records:
            self.find(key, parent)

    def _note(self, key: bytes, num_bytes: int | None) -> None:
        with self._lock:
            if num_bytes is None:
                self._known.pop(key, None)
            else:
                self._known[key] = num_bytes
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)

    def use(self, records: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Count records, a key and its parent's each, as used now."""
        self._begin(self._writer, self._writing, self._use, records)

    def _use(self, records: Sequence[tuple[bytes, bytes | None]]) -> None:
        self._folder.use([name_of(self._identity, key, parent) for key, parent in records])

    # ---- reading -------------------------------------------------------------------------

    def read(self, key: bytes, parent: bytes | None, pieces: list[Tensor]) -> DiskRead:
        """Begin to read a record into `pieces`."""
        return DiskRead(self._begin(self._readers, self._reading, self._read, key, parent, pieces))

    def _read(self, key: bytes, parent: bytes | None, pieces: list[Tensor]) -> bool:
        name = name_of(self._identity, key, parent)
        path = self._folder.path / name
        try:
            read_record(path, self._identity, key, pieces)
        except FileNotFoundError:
            self._note(key, None)  # another process evicted it
            return False
        except BadRecordError as error:
            self._failed("reading a record", error, where=str(path))
            self._remove(name)
            self._note(key, None)
            return False
        with self._lock:
            self.counters.read += 1
            self.counters.read_bytes += sum(len(piece) for piece in pieces)
        return True

    # ---- writing -------------------------------------------------------------------------

    def write(self, key: bytes, parent: bytes | None, pieces: list[Tensor], given: Given) -> bool:
        """Queue a record to be written; False if it is dropped, because too much is queued.

        Args:
            pieces: its bytes, which must stay until `given` is in `take_written`.
        """
        num_bytes = sum(len(piece) for piece in pieces)
        with self._lock:
            if self._queued and self._queued + num_bytes > MAX_BYTES_QUEUED:
                self.counters.dropped += 1
                return False
            self._queued += num_bytes
        self._begin(self._writer, self._writing, self._write, key, parent, pieces, given)
        return True

    def _write(self, key: bytes, parent: bytes | None, pieces: list[Tensor], given: Given) -> None:
        num_bytes = sum(len(piece) for piece in pieces)
        try:
            written = self._put(name_of(self._identity, key, parent), key, pieces)
            self._note(key, num_bytes if written is not None else None)
            with self._lock:
                if written:
                    self.counters.written += 1
                    self.counters.written_bytes += num_bytes
        finally:
            with self._lock:
                self._queued -= num_bytes
            self._written.append(given)

    def _put(self, name: str, key: bytes, pieces: list[Tensor]) -> bool | None:
        """Write a record: True, or False if it is there already, None if it has no room."""
        if self._folder.size_of(name) is not None:  # another process wrote it
            self._folder.use([name])
            return False
        size = HEADER_BYTES + sum(len(piece) for piece in pieces)
        found = self._folder.reserve(size)
        if found is None:
            with self._lock:
                self.counters.dropped += 1
            return None
        file, path, evicted = found
        try:
            with file:
                write_body(file, header(self._identity, key, pieces), pieces)
                self._folder.keep(path, name)
        except BaseException:
            self._folder.drop(path, size)
            raise
        with self._lock:
            self.counters.evicted += evicted
        self._num_records += 1 - evicted
        self._used_bytes = self._folder.used()
        return True

    def take_written(self) -> list[Given]:
        """What was given with records that were written or dropped since the last call."""
        found = []
        while self._written:
            found.append(self._written.popleft())
        return found

    def forget(self, key: bytes, parent: bytes | None) -> None:
        """Remove a record, behind the writes that are queued."""
        self._note(key, None)
        self._begin(self._writer, self._removing, self._forget, key, parent)

    @property
    def _removing(self) -> str:
        return f"removing records from the store {self._folder.path}"

    def _forget(self, key: bytes, parent: bytes | None) -> None:
        self._remove(name_of(self._identity, key, parent))
        self._note(key, None)

    def _remove(self, name: str) -> None:
        try:
            self._folder.remove(name)
        except OSError as error:
            self._failed(self._removing, error)

    def forget_all(self) -> None:
        """Remove all records of this model and format."""
        self._forget_known()
        self._begin(self._writer, self._removing, self._forget_all)

    def _forget_known(self) -> None:
        with self._lock:
            self._known.clear()

    def _forget_all(self) -> None:
        self._forget_known()
        for entry in self._folder.entries():
            if entry.identity == self._identity.hex()[:16]:
                self._remove(entry.name)

    def _count(self) -> None:
        """What the folder has now; later it is known by what this process writes."""
        try:
            self._folder.recount()
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
        entries = self._folder.entries()
        self._used_bytes = sum(entry.num_bytes for entry in entries)
        self._num_records = len(entries)

    def flush(self) -> None:
        """Wait until everything that is queued is written."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is queued, and end the threads."""
        self._writer.shutdown(wait=True)
        self._looker.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)

    def stats(self) -> dict[str, int]:
        """The bytes that the folder may take, those of its records, their number, and totals."""
        return {
            "capacity_bytes": self._folder.max_bytes or 0,
            "bytes": self._used_bytes,
            "records": self._num_records,
            **self.counters.stats(),
        }

    def check_integrity(self) -> None:
        """Nothing: other processes change the folder as they like."""
