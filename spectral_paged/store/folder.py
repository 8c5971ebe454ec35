"""A folder of records of a limited size, which several processes share.

```
<identity>-<key>-<parent>.page   a record: names of its model and format, itself, the one before
<number>.tmp                     a record that is being written, locked by its writer
usage                            bytes that records take; whoever changes them holds its lock
```
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from spectral_paged.errors import InvalidRequestError
from spectral_paged.store.chain_order import ChainOrder

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}-[0-9a-f]{32}\.page")
_TOTAL = struct.Struct("<Q")
NO_PARENT = "0" * 32
LEAVE = 0.95  # of the size stays when records are evicted, so that not every write looks for some


def name_of(identity: bytes, key: bytes, parent: bytes | None) -> str:
    """The file name of a record; keys may hold anything, names are hexadecimal."""
    behind = NO_PARENT if parent is None else _named(digest_of(parent))
    return f"{start_of_name(identity, digest_of(key))}-{behind}.page"


def start_of_name(identity: bytes, digest: bytes) -> str:
    """The part of a name that says which record it is, and not which one is before it."""
    return f"{identity.hex()[:16]}-{_named(digest)}"


def digest_of(key: bytes) -> bytes:
    """32 bytes that stand for a key of any length."""
    return hashlib.sha256(key).digest()


def _named(digest: bytes) -> str:
    return digest.hex()[:32]


@dataclass(frozen=True, slots=True)
class Entry:
    """A record's file: its name, size in bytes, and when it was last used, in nanoseconds."""

    name: str
    num_bytes: int
    used: int

    @property
    def identity(self) -> str:
        return self.name[:16]


class Folder:
    """Records in a folder, in files that only their owner may read.

    Args:
        path: the folder, which is made if it is not there.
        max_bytes: the most bytes of all records together; None: as they are, for looking at them.

    Raises:
        OSError: there is no such folder and none can be made.
        InvalidRequestError: this system has no locks that end with their process.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        if not HAS_LOCKS:
            raise InvalidRequestError(
                f"kv_store={str(path)!r}: a store in a folder needs POSIX file locks (fcntl), "
                "which this system has not: leave kv_store out, and take kv_host_memory"
            )
        self.path = path
        self.max_bytes = max_bytes
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def entries(self) -> list[Entry]:
        """The records that are there now."""
        found = []
        with os.scandir(self.path) as files:
            for file in files:
                if _NAME.fullmatch(file.name):
                    try:
                        stat = file.stat(follow_symlinks=False)
                    except FileNotFoundError:  # another process removed it
                        continue
                    found.append(Entry(file.name, stat.st_size, stat.st_mtime_ns))
        return found

    def size_of(self, name: str) -> int | None:
        """The bytes of a record's file; None if it is not there."""
        try:
            return os.stat(self.path / name).st_size
        except OSError:
            return None

    def use(self, names: Iterable[str]) -> None:
        """Count records as used now."""
        for name in names:
            try:
                os.utime(self.path / name)
            except OSError:
                continue  # it is gone, or the folder is for reading only

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file of the bytes in use, while no other process changes them."""
        handle = os.open(self.path / "usage", os.O_RDWR | os.O_CREAT, 0o600)
        with open(handle, "r+b", buffering=0) as usage:
            fcntl.flock(usage, fcntl.LOCK_EX)
            yield usage

    def used(self) -> int:
        """The bytes in use, as they were counted last."""
        try:
            with open(self.path / "usage", "rb", buffering=0) as usage:
                return _get(usage)
        except OSError:
            return 0

    def recount(self) -> int:
        """Remove what killed processes left, count the bytes in use and return them."""
        with self._locked() as usage:
            return self._recount(usage)

    def _recount(self, usage: BinaryIO) -> int:
        total = sum(entry.num_bytes for entry in self.entries())
        for temporary in self.path.glob("*.tmp"):
            if not self._is_orphan(temporary):
                total += temporary.stat().st_size
        _set(usage, total)
        return total

    def _is_orphan(self, path: Path) -> bool:
        """Remove a temporary file that nobody writes; False if somebody does."""
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            path.unlink()
            return True

    def reserve(self, num_bytes: int) -> tuple[BinaryIO, Path, int] | None:
        """A temporary file of so many bytes, its path, and the number of records that were evicted
        for it; None if so many can never be had.

        Raises:
            OSError: the disk is full, the folder is for reading only or gone, ...
        """
        assert self.max_bytes is not None, "the folder is written"
        if num_bytes > self.max_bytes:
            return None
        with self._locked() as usage:
            total, evicted = _get(usage), 0
            if total + num_bytes > self.max_bytes:
                total = self._recount(usage)
                wanted = int(min(self.max_bytes * LEAVE, self.max_bytes - num_bytes))
                if total + num_bytes > self.max_bytes:
                    total, evicted = self._evict(total, wanted)
                    _set(usage, total)
            if total + num_bytes > self.max_bytes:
                return None  # others are writing
            handle, name = tempfile.mkstemp(".tmp", "", self.path)
            path = Path(name)
            file = os.fdopen(handle, "wb", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                _allocate(file, num_bytes)
                _set(usage, total + num_bytes)
            except BaseException:
                file.close()
                path.unlink(missing_ok=True)
                raise
        return file, path, evicted

    def shrink(self, max_bytes: int) -> int:
        """Remove what killed processes left, and the least recently used records until `max_bytes`
        are left; returns the number of records removed."""
        with self._locked() as usage:
            total, removed = self._evict(self._recount(usage), max_bytes)
            _set(usage, total)
        return removed

    def _evict(self, total: int, wanted: int) -> tuple[int, int]:
        """Remove ends of chains, the least recently used first, until `wanted` bytes are left."""
        sizes: dict[str, int] = {}
        order = ChainOrder()
        names: dict[bytes, str] = {}
        for entry in sorted(self.entries(), key=lambda entry: entry.used):
            _, key, parent = entry.name.removesuffix(".page").split("-")
            mine = f"{entry.identity}-{key}".encode()
            names[mine], sizes[entry.name] = entry.name, entry.num_bytes
            order.add(mine, f"{entry.identity}-{parent}".encode())
        evicted = 0
        while total > wanted and (oldest := order.oldest(lambda key: True)) is not None:
            order.remove(oldest)
            (self.path / names[oldest]).unlink(missing_ok=True)
            total -= sizes[names[oldest]]
            evicted += 1
        return total, evicted

    def keep(self, temporary: Path, name: str) -> None:
        """Give a finished temporary file its name; it may be another process's record's."""
        with self._locked() as usage:  # nobody counts meanwhile
            replaced = self.size_of(name) or 0
            os.rename(temporary, self.path / name)
            _set(usage, max(0, _get(usage) - replaced))

    def drop(self, temporary: Path, num_bytes: int) -> None:
        """Remove a temporary file that was not finished."""
        with self._locked() as usage:
            temporary.unlink(missing_ok=True)
            _set(usage, max(0, _get(usage) - num_bytes))

    def remove(self, name: str) -> bool:
        """Remove a record; False if it was not there.

        Raises:
            OSError: it cannot be removed.
        """
        try:
            with self._locked() as usage:
                num_bytes = self.size_of(name) or 0
                os.unlink(self.path / name)
                _set(usage, max(0, _get(usage) - num_bytes))
        except FileNotFoundError:
            return False
        return True


def _get(usage: BinaryIO) -> int:
    usage.seek(0)
    data = usage.read(_TOTAL.size)
    return _TOTAL.unpack(data)[0] if len(data) == _TOTAL.size else 0


def _set(usage: BinaryIO, total: int) -> None:
    usage.seek(0)
    usage.write(_TOTAL.pack(total))


def _allocate(file: BinaryIO, num_bytes: int) -> None:
    """Take the bytes of a file now, so that a full disk shows before anything is written."""
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(file.fileno(), num_bytes)
