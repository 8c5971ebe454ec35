"""Records on disk: whole or a miss, of limited size, for their owner alone, for many processes."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from spectral_paged.errors import InvalidRequestError
from spectral_paged.store import (
    BadRecordError,
    DiskTier,
    Folder,
    HostCopier,
    HostTier,
    Tiers,
    folder as folder_module,
    record_file,
)
from spectral_paged.store.folder import name_of
from spectral_paged.store.memory import HostMemory
from spectral_paged.store.record_file import HEADER_BYTES, check_record

IDENTITY = bytes(range(32))
FRAME, NUM_BYTES = 1024, 3000
SIZE = HEADER_BYTES + NUM_BYTES


@pytest.fixture
def disk(tmp_path):
    tiers = []

    def make(max_bytes=100 * SIZE, identity=IDENTITY):
        tiers.append(DiskTier(Folder(tmp_path / "store", max_bytes), identity))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()


def body(seed):
    g = torch.Generator().manual_seed(seed)
    return [x.clone() for x in torch.randint(256, (NUM_BYTES,), generator=g).byte().split(FRAME)]


def write(tier, key, parent=None, seed=None):
    done = object()
    written = tier.write(key, parent, body(key[0] if seed is None else seed), done)
    tier.flush()
    return written and done in tier.take_written()


def read(tier, key, parent=None):
    """The bytes of a record, or None where it is a miss."""
    pieces = [torch.zeros_like(x) for x in body(0)]
    copy = tier.read(key, parent, pieces)
    copy.wait()
    assert copy.is_done
    return None if copy.failed else torch.cat(pieces)


def path_of(tier, key, parent=None):
    return tier._folder.path / name_of(IDENTITY, key, parent)


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


def test_files_are_their_owners_alone(disk):
    tier = disk()
    write(tier, b"a")
    folder = tier._folder.path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("key", [b"../../x", b"/etc/passwd", b"a\0\0", b"\xff" * 99, b""])
def test_no_key_leaves_the_folder(disk, key):
    tier = disk()
    assert write(tier, key, key, seed=1)
    (found,) = [f for f in tier._folder.path.iterdir() if f.suffix == ".page"]
    assert found.parent == tier._folder.path
    assert torch.equal(read(tier, key, key), torch.cat(body(1)))


def spoil(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-1]
    elif how == "no header":
        data = data[: HEADER_BYTES - 1]
    elif how == "longer":
        data += b"\0"
    elif how == "foreign":
        data[:8] = b"\x7fELFELF\0"
    elif how == "older":
        data[8:12] = (0).to_bytes(4, "little")
    elif how == "another":
        data = bytearray(path.with_name(name_of(IDENTITY, b"b", None)).read_bytes())
    elif how == "empty":
        data = bytearray(HEADER_BYTES + 1)
    path.write_bytes(data)


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


def test_a_system_without_file_locks_has_no_store(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "HAS_LOCKS", False)
    with pytest.raises(InvalidRequestError, match="kv_store=.* take kv_host_memory"):
        Folder(tmp_path / "store", 1 << 20)
    assert not (tmp_path / "store").exists()


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


# ---- size --------------------------------------------------------------------------------


def total(tier):
    return sum(f.stat().st_size for f in tier._folder.path.iterdir() if f.suffix == ".page")


def test_the_size_is_a_hard_limit_and_the_end_of_the_oldest_chain_goes_first(disk):
    tier = disk(4 * SIZE)
    for key, parent in ((b"a1", None), (b"a2", b"a1"), (b"b1", None), (b"b2", b"b1")):
        assert write(tier, key, parent)
    os.utime(path_of(tier, b"b1"), ns=(1, 1))
    os.utime(path_of(tier, b"b2", b"b1"), ns=(1, 1))
    assert write(tier, b"c1") and total(tier) <= 4 * SIZE
    assert tier.find(b"b2", b"b1") is None and tier.find(b"b1", None)
    assert tier.find(b"a2", b"a1") and tier.counters.evicted == 1


def test_what_was_used_stays(disk):
    tier = disk(3 * SIZE)
    for key in (b"a", b"b", b"c"):
        write(tier, key)
        os.utime(path_of(tier, key), ns=(key[0], key[0]))
    tier.use([(b"a", None)])
    write(tier, b"d")
    assert tier.find(b"a", None) and tier.find(b"b", None) is None


def test_two_processes_keep_one_size(disk):
    one, two = disk(5 * SIZE), disk(5 * SIZE)
    for i in range(12):
        write((one, two)[i % 2], bytes([65 + i]))
        assert total(one) <= 5 * SIZE
    assert len(one._folder.entries()) >= 4


def test_a_record_larger_than_the_store_is_dropped(disk):
    tier = disk(SIZE - 1)
    write(tier, b"a")
    assert tier.find(b"a", None) is None and tier.counters.dropped == 1


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(disk):
    tier = disk()
    file, path, _ = tier._folder.reserve(SIZE)
    left = tier._folder.path / "left.tmp"
    left.write_bytes(bytes(500))
    assert tier._folder.recount() == SIZE and path.exists() and not left.exists()
    file.close()
    assert tier._folder.recount() == 0 and not path.exists()


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


# ---- both tiers --------------------------------------------------------------------------


def tiers_of(tier, num_frames=8):
    return Tiers(HostTier(HostMemory(num_frames * FRAME, FRAME, poison=True), HostCopier()), tier)


def test_what_comes_to_host_memory_goes_to_disk_and_comes_back(disk):
    tiers = tiers_of(disk())
    views = [torch.cat(body(1))[None]]
    assert tiers.save(b"a", None, views)
    tiers.finish()
    tiers.disk.flush()
    tiers.settle()
    tiers.host.forget(b"a")
    tiers.check_integrity()
    assert tiers.where(b"a", None) == "disk"
    held = tiers.hold(b"a", None)
    held.copy.wait()
    assert torch.equal(torch.cat(tiers.host.pieces(held)), views[0][0])
    tiers.let_go(held)
    assert tiers.where(b"a", None) == "host"
    tiers.forget(b"a", None)
    tiers.disk.flush()
    assert tiers.where(b"a", None) is None
    with pytest.raises(KeyError):
        tiers.hold(b"a", None)


def test_a_record_that_cannot_be_read_leaves_host_memory(disk):
    tiers = tiers_of(disk())
    write(tiers.disk, b"a")
    spoil(path_of(tiers.disk, b"a"), "truncated")
    held = tiers.hold(b"a", None)
    held.copy.wait()
    assert held.copy.failed
    tiers.let_go(held)
    assert not tiers.is_known(b"a", None) and tiers.host.stats()["bytes"] == 0
    tiers.check_integrity()


def test_closing_writes_what_is_queued(disk, tmp_path):
    tiers = tiers_of(disk())
    assert tiers.save(b"a", None, [torch.cat(body(1))[None]])
    tiers.close()
    assert disk().find(b"a", None) == NUM_BYTES


# ---- kills -------------------------------------------------------------------------------

# One process imports torch; its children write records until they are killed.
PARENT = """
import os, sys
from pathlib import Path
import torch
from spectral_paged.store import DiskTier, Folder

def write_records(number):
    tier = DiskTier(Folder(Path(sys.argv[1]), int(sys.argv[2])), bytes(range(32)))
    while True:
        number += 1
        body = torch.full((200_000,), number % 251, dtype=torch.uint8)
        tier.write(b"%d" % number, None, list(body.split(70_000)), None)
        tier.flush()
        print("wrote", number, flush=True)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        write_records(int(line))
    print("child", pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", 0, flush=True)
"""


def killed_writer(parent, start, seconds):
    """Have a child write records from `start` on, kill it after a time; the last that it wrote."""
    parent.stdin.write(f"{start}\n")
    parent.stdin.flush()
    last = start
    for line in parent.stdout:
        what, number = line.split()
        if what == "wrote":
            last = int(number)
        elif what == "child":
            time.sleep(seconds)
            os.kill(int(number), signal.SIGKILL)
        else:
            return last
    raise AssertionError("the parent ended")


def test_kills_while_records_are_written_lose_no_other(tmp_path):
    """Every record that was finished is there, whole; nothing is left of others, and the size
    holds. `make kills` kills 200 times."""
    folder, size, last = tmp_path / "store", 300 * 200_200, 0
    moments = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        for _ in range(int(os.environ.get("STORE_KILLS", "12"))):
            end = killed_writer(parent, last, moments.random() * 0.06)
            tier = DiskTier(Folder(folder, size), IDENTITY)
            tier.flush()
            assert not list(folder.glob("*.tmp"))
            assert tier._folder.used() == total(tier) <= size
            pieces = list(torch.zeros(200_000, dtype=torch.uint8).split(70_000))
            for number in range(max(last + 1, end - 200), end + 1):
                copy = tier.read(b"%d" % number, None, pieces)
                copy.wait()
                assert not copy.failed, "a record that was finished is lost"
                assert all((piece == number % 251).all() for piece in pieces)
            for entry in tier._folder.entries():
                check_record(folder / entry.name)
            assert tier.counters.failed == 0
            tier.close()
            last = end + 1  # this one may be there or not
        parent.stdin.close()
    assert last > 3, "nothing was written"
