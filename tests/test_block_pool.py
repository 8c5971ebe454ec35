"""BlockPool against a plain model, and its refusals."""

from __future__ import annotations

import pytest
from checked_pool import CheckedPool
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from spectral_paged.block_pool import BlockPool, Kind
from spectral_paged.errors import PoolError


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations; `CheckedPool` is the model."""

    @initialize(
        num_slabs=st.integers(2, 5),
        slots=st.sampled_from([(3, 2), (1, 1), (4, 1), (1, 3), (2, None)]),
    )
    def start(self, num_slabs, slots):
        kinds = {kind: count for kind, count in zip(Kind, slots) if count}
        self.checked = CheckedPool(num_slabs, kinds)

    def _index(self, data):
        return data.draw(st.integers(0, len(self.checked.refs) - 1))

    @rule(kind=st.sampled_from(list(Kind)))
    def allocate(self, kind):
        self.checked.allocate(kind)

    @precondition(lambda self: self.checked.refs)
    @rule(data=st.data())
    def share(self, data):
        self.checked.share(self._index(data))

    @precondition(lambda self: self.checked.refs)
    @rule(data=st.data())
    def release(self, data):
        self.checked.release(self._index(data))

    @precondition(lambda self: self.checked.refs)
    @rule(data=st.data(), key=st.integers(0, 20))
    def publish(self, data, key):
        self.checked.publish(self._index(data), key)

    @precondition(lambda self: self.checked.refs)
    @rule(data=st.data())
    def unpublish(self, data):
        self.checked.unpublish(self._index(data))

    @rule(key=st.integers(0, 20))
    def hit(self, key):
        self.checked.hit(key)

    @rule()
    def drop(self):
        self.checked.drop()

    @invariant()
    def whole(self):
        if hasattr(self, "checked"):
            self.checked.check()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


def pool(slabs=2, exact=4, page=2):
    return BlockPool(slabs, {Kind.EXACT: exact, Kind.PAGE: page})


def test_double_free_and_use_after_free_raise_at_once():
    p = pool()
    slot = p.allocate(Kind.EXACT)
    p.release(slot)
    with pytest.raises(PoolError, match="double free"):
        p.release(slot)
    with pytest.raises(PoolError, match="use after free"):
        p.acquire(slot)


def test_publishing_twice_or_when_free_raises():
    p = pool()
    slot = p.allocate(Kind.PAGE)
    assert p.publish(slot, "a")
    with pytest.raises(PoolError, match="already"):
        p.publish(slot, "b")
    other = p.allocate(Kind.PAGE)
    assert not p.publish(other, "a")
    p.release(other)
    with pytest.raises(PoolError, match="not in use"):
        p.publish(other, "c")


def test_least_recently_released_is_evicted_first():
    p = pool(slabs=1, exact=3)
    slots = [p.allocate(Kind.EXACT) for _ in range(3)]
    for i, slot in enumerate(slots):
        p.publish(slot, i)
    for i in (1, 0, 2):
        p.release(slots[i])
    p.acquire(slots[1])
    p.release(slots[1])
    p.allocate(Kind.EXACT)
    assert p.lookup(0) is None and p.lookup(1) is not None and p.lookup(2) is not None


def test_a_slab_changes_kind_only_when_nothing_in_it_is_in_use():
    p = pool(slabs=1, exact=4, page=2)
    slot = p.allocate(Kind.EXACT)
    assert p.allocate(Kind.PAGE) is None
    p.release(slot)
    assert p.allocate(Kind.PAGE) is not None
    assert p.allocate(Kind.EXACT) is None


def test_a_kind_that_the_pool_has_not_evicts_nothing():
    p = BlockPool(2, {Kind.EXACT: 2})
    slot = p.allocate(Kind.EXACT)
    p.publish(slot, "a")
    p.release(slot)
    assert p.allocate(Kind.PAGE) is None
    assert p.lookup("a") == slot and p.num_evicted == 0
    p.check_integrity()
