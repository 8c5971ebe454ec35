"""The speed of the disk itself, without a store, as the store uses it."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FILE_BYTES = 16 << 20  # as a record of a large model
NUM_READERS = 4  # as a store has


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes a second of files of `file_bytes`: written one after another, each stored by the
    system, and read by four threads, from the disk and again from the system's memory."""

    file_bytes: int
    num_files: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    cached_read_bytes_per_second: float


def drop_cached(folder: Path) -> None:
    """Have the system forget the files of a folder, so that they are read from the disk; a file
    system in memory forgets nothing."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> int:
    with open(path, "rb", buffering=0) as file:
        return file.readinto(bytearray(os.fstat(file.fileno()).st_size)) or 0


def _rate(paths: list[Path]) -> float:
    begin = time.perf_counter()
    with ThreadPoolExecutor(NUM_READERS) as readers:
        num_bytes = sum(readers.map(_read, paths))
    return num_bytes / (time.perf_counter() - begin)


def measure_disk(folder: Path, num_bytes: int) -> DiskSpeed:
    """Write and read `num_bytes` in files of their own in `folder`, and remove them."""
    size = min(FILE_BYTES, num_bytes)
    body = os.urandom(size)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        probe = Path(name)
        paths = [probe / str(i) for i in range(max(1, num_bytes // size))]
        begin = time.perf_counter()
        for path in paths:
            with open(path, "wb", buffering=0) as file:
                file.write(body)
                os.fsync(file.fileno())
        written = len(paths) * size / (time.perf_counter() - begin)
        drop_cached(probe)
        read = _rate(paths)
        return DiskSpeed(size, len(paths), written, read, _rate(paths))
