"""A folder of records: of a limited size, for its owner alone, shared by many processes."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from spectral_paged.errors import InvalidRequestError
from spectral_paged.store import Folder, folder as folder_module
from support.disk_records import SIZE, body, path_of, read, total, write


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


def test_a_system_without_file_locks_has_no_store(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "HAS_LOCKS", False)
    with pytest.raises(InvalidRequestError, match="kv_store=.* take kv_host_memory"):
        Folder(tmp_path / "store", 1 << 20)
    assert not (tmp_path / "store").exists()


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
