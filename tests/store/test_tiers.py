"""Host memory and disk together: records go down, and come back."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from spectral_paged.store import HostCopier, HostTier, Tiers, disk_tier
from spectral_paged.store.disk_tier import NUM_READERS
from spectral_paged.store.memory import HostMemory
from support.disk_records import FRAME, NUM_BYTES, body, path_of, spoil, write


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
    assert tiers.where(b"a") == "disk"
    held = tiers.hold(b"a", None)
    held.copy.wait()
    assert torch.equal(torch.cat(tiers.host.pieces(held)), views[0][0])
    tiers.let_go(held)
    assert tiers.where(b"a") == "host"
    tiers.forget(b"a", None)
    tiers.disk.flush()
    assert tiers.where(b"a") is None
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
    assert not tiers.is_known(b"a") and tiers.host.stats()["bytes"] == 0
    tiers.check_integrity()


def test_closing_writes_what_is_queued(disk, tmp_path):
    tiers = tiers_of(disk())
    assert tiers.save(b"a", None, [torch.cat(body(1))[None]])
    tiers.close()
    assert disk().find(b"a", None) == NUM_BYTES


def test_the_end_of_a_sequence_waits_for_no_read_of_another_request(disk):
    """What comes from the device is waited for, because no step would hand it on."""
    tiers = tiers_of(disk())
    write(tiers.disk, b"a")
    reading = threading.Event()
    gate = tiers.disk._readers
    for _ in range(NUM_READERS):
        gate.submit(reading.wait, 10)
    held = tiers.hold(b"a", None)
    begin = time.monotonic()
    assert tiers.save(b"b", None, [torch.cat(body(2))[None]])
    tiers.finish()
    assert time.monotonic() - begin < 5 and not held.copy.is_done
    reading.set()
    tiers.disk.flush()
    assert tiers.disk.find(b"b", None) == NUM_BYTES
    held.copy.wait()
    tiers.let_go(held)
    tiers.check_integrity()


def test_what_another_process_wrote_is_known_once_it_was_looked_for(disk):
    """No call of the engine's thread asks the file system."""
    tiers = tiers_of(disk())
    write(disk(), b"a")
    assert tiers.where(b"a") is None
    tiers.look([(b"a", None), (b"b", None)]).result()
    assert tiers.where(b"a") == "disk" and tiers.where(b"b") is None
    path_of(tiers.disk, b"a").unlink()
    assert tiers.where(b"a") == "disk", "nobody told"
    held = tiers.hold(b"a", None)
    held.copy.wait()
    assert held.copy.failed
    tiers.let_go(held)
    assert tiers.where(b"a") is None
    tiers.close()


def test_records_that_are_remembered_are_bounded(disk, monkeypatch):
    monkeypatch.setattr(disk_tier, "MAX_KNOWN", 2)
    tier = disk()
    for key in (b"a", b"b", b"c"):
        write(tier, key)
    assert [tier.known_size(key) for key in (b"a", b"b", b"c")] == [None, NUM_BYTES, NUM_BYTES]
