"""Records on disk are whole or a miss, and no fault of a disk ends a request."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading

import pytest
import torch

from spectral_paged.store import BadRecordError, folder as folder_module, record_file
from spectral_paged.store.record_file import HEADER_BYTES, check_record
from support.disk_records import IDENTITY, NUM_BYTES, SIZE, body, path_of, read, spoil, write


def test_a_record_is_read_as_it_was_written(disk):
    tier = disk()
    assert tier.find(b"a", None) is None and read(tier, b"a") is None
    assert write(tier, b"a") and write(tier, b"b", b"a")
    assert tier.find(b"a", None) == NUM_BYTES
    assert torch.equal(read(tier, b"a"), torch.cat(body(b"a"[0])))
    again = disk()
    assert torch.equal(read(again, b"b", b"a"), torch.cat(body(b"b"[0])))
    assert read(again, b"b") is None, "behind another record it is another"
    again.flush()
    assert again.stats()["records"] == 2 and again.stats()["bytes"] == 2 * SIZE
    assert again.counters.failed == 0


def test_another_identity_finds_nothing(disk):
    write(disk(), b"a")
    other = disk(identity=bytes(32))
    assert other.find(b"a", None) is None and read(other, b"a") is None


SPOILED = ["truncated", "no header", "longer", "foreign", "older", "another", "empty"]


@pytest.mark.parametrize("how", SPOILED)
def test_a_record_that_is_not_whole_is_a_miss_told_once_and_removed(disk, how, caplog):
    tier = disk()
    for key in (b"a", b"b"):
        write(tier, key)
    spoil(path_of(tier, b"a"), how)
    if how != "another":  # it is whole, but in another's place
        with pytest.raises(BadRecordError):
            check_record(path_of(tier, b"a"))
    with caplog.at_level(logging.WARNING):
        assert read(tier, b"a") is None and read(tier, b"a") is None
    assert tier.counters.failed == len(caplog.records) == 1
    assert str(path_of(tier, b"a")) in caplog.text
    assert tier.find(b"a", None) is None and tier.find(b"b", None)
    assert write(tier, b"a") and read(tier, b"a") is not None


def test_many_damaged_records_are_told_once(disk, caplog):
    tier = disk()
    keys = [bytes([i]) for i in range(5)]
    for key in keys:
        write(tier, key)
        spoil(path_of(tier, key), "truncated")
    with caplog.at_level(logging.WARNING):
        assert [read(tier, key) for key in keys] == [None] * 5
    assert tier.counters.failed == 5 and len(caplog.records) == 1


def test_a_bit_that_is_flipped_anywhere_is_noticed(disk):
    tier = disk()
    write(tier, b"a")
    path = path_of(tier, b"a")
    whole = path.read_bytes()
    places = [*range(HEADER_BYTES * 8), *range(HEADER_BYTES * 8, len(whole) * 8, 997)]
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(BadRecordError):
            record_file.read_record(path, IDENTITY, b"a", body(0))
    path.write_bytes(whole)
    record_file.read_record(path, IDENTITY, b"a", body(0))


# ---- faults ------------------------------------------------------------------------------


def test_a_full_disk_is_told_once_and_counted(disk, monkeypatch, caplog):
    tier = disk()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module.os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING):
        for key in (b"a", b"b"):
            assert write(tier, key), "the writer gives the record back"
    assert tier.counters.failed == 2 and len(caplog.records) == 1
    assert "No space left" in caplog.text
    monkeypatch.undo()
    assert write(tier, b"a") and read(tier, b"a") is not None
    assert tier._folder.used() == SIZE, "bytes that were not written are not counted"


class Odd(BaseException):
    """What no list of exceptions has."""


@pytest.mark.parametrize("error", [OSError, MemoryError, TypeError, AssertionError, Odd])
@pytest.mark.parametrize("job", ["write_body", "read_record"])
def test_whatever_a_thread_raises_is_told_once_and_counted(disk, monkeypatch, caplog, error, job):
    tier = disk()
    write(tier, b"c")

    def failing(*_):
        raise error("something")

    monkeypatch.setattr(f"spectral_paged.store.disk_tier.{job}", failing)
    with caplog.at_level(logging.WARNING):
        for key in (b"a", b"b"):
            if job == "write_body":
                assert write(tier, key), "the writer gives the record back"
                assert tier.find(key, None) is None and tier._queued == 0
            else:
                assert read(tier, b"c") is None
    assert tier.stats()["failures"] == 2 and len(caplog.records) == 1
    assert error.__name__ in caplog.text and "something" in caplog.text
    monkeypatch.undo()
    assert write(tier, b"a") and read(tier, b"a") is not None and read(tier, b"c") is not None


@pytest.mark.parametrize("call", ["recount", "entries", "use", "remove"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), TypeError("odd")])
def test_jobs_beside_reads_and_writes_are_told_as_well(disk, monkeypatch, caplog, call, error):
    write(disk(), b"a")

    def failing(*_):
        raise error

    monkeypatch.setattr(folder_module.Folder, call, failing)
    tier = disk()
    tier.use([(b"a", None)])
    tier.forget(b"a", None)
    tier.flush()
    assert tier.counters.failed >= 1 and len(caplog.records) == 1
    assert str(error).split("]")[-1].strip() in caplog.text
    monkeypatch.undo()
    assert write(tier, b"b")


def test_a_look_that_fails_is_a_miss_and_told(disk, monkeypatch, caplog):
    tier = disk()
    monkeypatch.setattr(folder_module.Folder, "size_of", lambda *_: 1 / 0)
    assert isinstance(tier.look([(b"a", None)]).exception(), ZeroDivisionError)
    assert tier.known_size(b"a") is None and tier.counters.failed == len(caplog.records) == 1


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_write_that_fails_leaves_nothing(disk, monkeypatch, call):
    tier = disk()

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    write(tier, b"a")
    monkeypatch.undo()
    assert tier.find(b"a", None) is None and tier.counters.failed == 1
    assert tier._folder.used() == 0 and not list(tier._folder.path.glob("*.tmp"))


def test_a_folder_that_disappears_is_a_miss(disk):
    tier = disk()
    write(tier, b"a")
    shutil.rmtree(tier._folder.path)
    assert tier.find(b"a", None) is None and read(tier, b"a") is None
    write(tier, b"b")
    assert tier.counters.failed == 1
    tier.forget(b"a", None)
    tier.forget_all()
    tier.flush()


def test_a_file_system_for_reading_only_is_read(disk, monkeypatch, caplog):
    """As for root, whom no permission keeps from writing."""
    write(disk(), b"a")

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    for call in ("open", "utime", "unlink", "rename"):
        monkeypatch.setattr(folder_module.os, call, refused)
    tier = disk()
    with caplog.at_level(logging.WARNING):
        tier.use([(b"a", None)])
        assert read(tier, b"a") is not None
        write(tier, b"b")
        write(tier, b"c")
    assert tier.find(b"b", None) is None and tier.counters.failed == 2
    assert len(caplog.records) == 1 and "Read-only file system" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_for_reading_only_is_read(disk):
    tier = disk()
    write(tier, b"a")
    tier._folder.path.chmod(0o500)
    try:
        again = disk()
        assert read(again, b"a") is not None
        write(again, b"b")
        assert again.counters.failed >= 1
    finally:
        tier._folder.path.chmod(0o700)


def test_a_read_that_fails_is_counted_and_the_record_stays(disk, monkeypatch):
    tier = disk()
    write(tier, b"a")

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("spectral_paged.store.disk_tier.read_record", failing)
    assert read(tier, b"a") is None and tier.counters.failed == 1
    monkeypatch.undo()
    assert read(tier, b"a") is not None


def test_too_much_in_the_queue_is_dropped(disk, monkeypatch):
    monkeypatch.setattr("spectral_paged.store.disk_tier.MAX_BYTES_QUEUED", NUM_BYTES)
    tier = disk()
    gate_open = threading.Event()
    gate = tier._writer.submit(gate_open.wait, 10)
    assert tier.write(b"a", None, body(1), 1)
    assert not tier.write(b"b", None, body(2), 2)
    gate_open.set()
    tier.flush()
    assert gate.done() and tier.take_written() == [1] and tier.counters.dropped == 1
