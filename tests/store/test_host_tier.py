"""Host memory is of a fixed size, holds whole records, and is given back to the system."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.errors import CapacityError
from spectral_paged.store import HostCopier, HostTier
from spectral_paged.store.cuda import CudaCopy
from spectral_paged.store.memory import HostMemory
from support.late_copies import LateCopier

FRAME = 256
CPU = torch.device("cpu")


def tier(num_frames=4, copier=None):
    return HostTier(HostMemory(num_frames * FRAME, FRAME, poison=True), copier or HostCopier())


def record(seed, sizes=(100,), layers=2):
    """Views of wide strides, as slots of planes have them."""
    g = torch.Generator().manual_seed(seed)
    planes = [torch.randint(256, (layers, size + 9), generator=g).byte() for size in sizes]
    return [plane[:, 4 : size + 4] for plane, size in zip(planes, sizes, strict=True)]


def read(host, key, sizes, layers=2, skip=()):
    views = [torch.zeros(layers, size, dtype=torch.uint8) for size in sizes]
    held = host.hold(key)
    wanted = [v.numel() if i in skip else v for i, v in enumerate(views)]
    copy = host.load(held, wanted)
    copy.wait()
    host.let_go(held)
    return views


@pytest.mark.parametrize("size", [1, 127, 128, 129, 255, 257, 300])
def test_a_record_comes_back_byte_for_byte(size):
    host, views = tier(8), record(0, (size, 3, size))
    assert host.save(b"a", None, views)
    assert b"a" in host
    for got, want in zip(read(host, b"a", (size, 3, size)), views, strict=True):
        assert torch.equal(got, want)
    some = read(host, b"a", (size, 3, size), skip=(0, 2))
    assert torch.equal(some[1], views[1]) and not some[0].any() and not some[2].any()
    host.check_integrity()


def test_a_record_is_found_once_it_has_come():
    host = tier(copier=LateCopier(most=0))
    host._copier.random.randint = lambda a, b: 2
    before = host.version
    assert host.save(b"a", None, record(0))
    assert host.is_known(b"a") and b"a" not in host
    assert host.version == before
    host.settle()
    assert b"a" in host and host.version == before + 1


def test_memory_is_a_hard_limit_and_the_oldest_chain_goes_first():
    host = tier(4)
    assert host.save(b"a1", None, record(1)) and host.save(b"a2", b"a1", record(2))
    assert host.save(b"b1", None, record(3)) and host.save(b"b2", b"b1", record(4))
    host.use([b"a2", b"a1"])
    assert host.save(b"c", None, record(5))
    assert [k for k in (b"a1", b"a2", b"b1", b"b2", b"c") if k in host] == [
        b"a1",
        b"a2",
        b"b1",
        b"c",
    ]
    assert host.stats()["bytes"] == host.stats()["capacity_bytes"] == 4 * FRAME
    assert host.counters.evicted == 1
    host.check_integrity()


def test_a_record_does_not_push_out_its_own_chain():
    host = tier(2)
    assert host.save(b"a1", None, record(1)) and host.save(b"a2", b"a1", record(2))
    assert not host.save(b"a3", b"a2", record(3)), "it would be of no use"
    assert b"a1" in host and b"a2" in host and host.counters.dropped == 1


def test_a_record_larger_than_the_memory_is_dropped_and_nothing_goes_for_it():
    host = tier(2)
    assert host.save(b"a", None, record(1))
    assert not host.save(b"b", None, record(2, (3 * FRAME,), layers=1))
    assert b"a" in host
    host.check_integrity()


def test_what_is_read_is_neither_evicted_nor_overwritten():
    host = tier(1, LateCopier(most=10**9))
    host._copier.random.randint = lambda a, b: 0
    views = record(1)
    assert host.save(b"a", None, views)
    host.settle()
    held = host.hold(b"a")
    assert not host.save(b"b", None, record(2))
    host.forget(b"a")
    assert b"a" not in host and not host.save(b"b", None, record(2))
    got = [torch.zeros(2, 100, dtype=torch.uint8)]
    host.load(held, got).wait()
    assert torch.equal(got[0], views[0])
    host.let_go(held)
    assert host.save(b"b", None, record(2))
    host.check_integrity()


def test_too_much_on_its_way_is_dropped_and_not_waited_for(monkeypatch):
    monkeypatch.setattr("spectral_paged.store.host_tier.MAX_BYTES_ON_WAY", 300)
    host = tier(8, LateCopier())
    host._copier.random.randint = lambda a, b: 10**9
    assert host.save(b"a", None, record(1, (400,)))  # one always passes
    assert not host.save(b"b", None, record(2))
    host._records[b"a"].copy.wait()
    assert host.save(b"b", None, record(2))


@pytest.mark.parametrize("error", [RuntimeError("CUDA"), MemoryError(), OSError(5, "I/O")])
def test_a_copy_that_fails_is_told_once_and_counted(error, caplog):
    class Failing(HostCopier):
        def save(self, views, pieces):
            raise error

    host = tier(4, Failing())
    with caplog.at_level(logging.WARNING):
        assert not host.save(b"a", None, record(1)) and not host.save(b"b", None, record(2))
    assert host.counters.failed == 2 and len(caplog.records) == 1
    assert host.stats()["bytes"] == 0
    host.check_integrity()


def test_free_memory_is_poisoned():
    host = tier(1)
    host.save(b"a", None, record(1))
    piece = host._memory.pieces([0], FRAME)[0]
    assert not (piece == 0xFF).all()
    host.forget(b"a")
    assert (piece == 0xFF).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.booleans()), max_size=30))
def test_any_order_of_writes_reads_and_losses_keeps_bytes(operations):
    host, want = tier(7, LateCopier(most=4)), {}
    for number, frames, lose in operations:
        key = bytes([number])
        if lose:
            host.forget(key)
        elif not host.is_known(key):
            views = record(number, (frames * FRAME // 2,))
            if host.save(key, bytes([number - 1]) if number % 3 else None, views):
                want[key] = views
        for other in [k for k in want if k in host]:
            sizes = [v.shape[1] for v in want[other]]
            for got, views in zip(read(host, other, sizes), want[other], strict=True):
                assert torch.equal(got, views)
        host.check_integrity()
    host.forget_all()
    for copy in [r.copy for r in host._doomed]:
        copy.wait()
    host.settle()
    assert host.stats()["bytes"] == 0 and host._memory.num_free == 7


def mapped():
    """Bytes of this process's address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096


def test_memory_goes_back_to_the_system():
    size = 1 << 32  # mapped, not touched
    before = mapped()
    memory = HostMemory.of(size, largest=1 << 20, usual=1 << 20, device=CPU, poison=False)
    host = HostTier(memory, HostCopier())
    assert mapped() - before > 0.9 * size
    host.close()
    assert mapped() - before < 0.1 * size


def test_memory_that_holds_no_prefix_is_refused_with_what_it_takes():
    with pytest.raises(CapacityError, match="at least 1152"):
        HostMemory.of(1151, largest=1000, usual=100, device=CPU, poison=False)
    HostMemory.of(1152, largest=1000, usual=100, device=CPU, poison=False).close()


def test_memory_that_the_system_has_not_is_refused():
    with pytest.raises(CapacityError, match="kv_host_memory"):
        HostMemory.of(1 << 60, largest=100, usual=100, device=CPU, poison=False)


def test_later_work_of_a_copys_own_device_waits_for_it(monkeypatch):
    """The current device may be another one."""
    waited = []

    class Stream:
        def __init__(self, device=None):
            self.wait_event = lambda event: waited.append((device, event))

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    device = torch.device("cuda:1")
    CudaCopy("an event", device, []).hold()
    assert waited == [(device, "an event")]
