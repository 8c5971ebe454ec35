"""Host memory and disk together: records go down, and come back."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.store import HostCopier, HostTier, Tiers
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
