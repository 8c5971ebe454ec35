"""`SlotPool` against a plain model of it, and its refusals."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from spectral_paged.errors import PoolError
from spectral_paged.pool.slot_pool import SlotKind, SlotPool
from support.checked_pool import CheckedPool


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations; `CheckedPool` is the model."""

    @initialize(
        num_slabs=st.integers(2, 5),
        slots=st.sampled_from([(3, 2), (1, 1), (4, 1), (1, 3), (2, None)]),
    )
    def start(self, num_slabs, slots):
        kinds = {kind: count for kind, count in zip(SlotKind, slots) if count}
        self.checked = CheckedPool(num_slabs, kinds)

    def _index(self, data):
        return data.draw(st.integers(0, len(self.checked.refs) - 1))

    @rule(kind=st.sampled_from(list(SlotKind)))
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

    @rule(key=st.integers(0, 20))
    def touch(self, key):
        self.checked.touch(key)

    @rule(key=st.integers(0, 20))
    def forget(self, key):
        self.checked.forget(key)

    @rule()
    def drop(self):
        self.checked.drop()

    @invariant()
    def whole(self):
        if hasattr(self, "checked"):
            self.checked.check()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


def test_a_long_random_walk_moves_slots_and_keeps_their_content():
    """Packing needs pools that are nearly full and torn: short examples seldom make one."""
    rng, moved = random.Random(0), 0
    for num_slabs, slots in ((4, (3, 2)), (3, (4, 1)), (2, (1, 3)), (5, (2, 4))):
        checked = CheckedPool(num_slabs, dict(zip(SlotKind, slots)))
        for _ in range(5_000):
            checked.any_operation(rng)
            checked.check()
        assert checked.pool.num_evicted > 0
        moved += checked.pool.num_moved
    assert moved > 20


def pool(slabs=2, exact=4, page=2):
    return SlotPool(slabs, {SlotKind.EXACT: exact, SlotKind.PAGE: page})


def test_double_free_and_use_after_free_raise_at_once():
    p = pool()
    slot = p.allocate(SlotKind.EXACT)
    p.release(slot)
    with pytest.raises(PoolError, match="double free"):
        p.release(slot)
    with pytest.raises(PoolError, match="use after free"):
        p.acquire(slot)


def test_publishing_twice_or_when_free_raises():
    p = pool()
    slot = p.allocate(SlotKind.PAGE)
    assert p.publish(slot, "a")
    with pytest.raises(PoolError, match="already"):
        p.publish(slot, "b")
    other = p.allocate(SlotKind.PAGE)
    assert not p.publish(other, "a")
    p.release(other)
    with pytest.raises(PoolError, match="not in use"):
        p.publish(other, "c")


def test_least_recently_released_is_evicted_first():
    p = pool(slabs=1, exact=3)
    slots = [p.allocate(SlotKind.EXACT) for _ in range(3)]
    for i, slot in enumerate(slots):
        p.publish(slot, i)
    for i in (1, 0, 2):
        p.release(slots[i])
    p.acquire(slots[1])
    p.release(slots[1])
    p.allocate(SlotKind.EXACT)
    assert p.lookup(0) is None and p.lookup(1) is not None and p.lookup(2) is not None


def test_a_slab_changes_kind_only_when_nothing_in_it_is_in_use():
    p = pool(slabs=1, exact=4, page=2)
    slot = p.allocate(SlotKind.EXACT)
    assert p.allocate(SlotKind.PAGE) is None
    p.release(slot)
    assert p.allocate(SlotKind.PAGE) is not None
    assert p.allocate(SlotKind.EXACT) is None


def test_a_kind_that_the_pool_has_not_evicts_nothing():
    p = SlotPool(2, {SlotKind.EXACT: 2})
    slot = p.allocate(SlotKind.EXACT)
    p.publish(slot, "a")
    p.release(slot)
    assert p.allocate(SlotKind.PAGE) is None
    assert p.lookup("a") == slot and p.num_evicted == 0
    p.check_integrity()


def torn():
    """A pool with slots in every state: exact 0 in use, 1 published and in use, 2 cached, 3 free;
    a page in use and one free; and an empty slab."""
    p = pool(slabs=3)
    slots = [p.allocate(SlotKind.EXACT) for _ in range(3)]
    p.publish(slots[1], "used")
    p.publish(slots[2], "cached")
    p.release(slots[2])
    p.allocate(SlotKind.PAGE)
    p.check_integrity()
    return p, slots


CORRUPTIONS = {
    "an empty slab is listed twice": lambda p, slab, s: p._empty.append(p._empty[0]),
    "a slab is both empty and held": lambda p, slab, s: p._empty.append(0),
    "a slab is lost": lambda p, slab, s: p._empty.pop(),
    "slab 0 lists a free slot twice": lambda p, slab, s: slab.free.extend([3, 3]),
    "slab 0: free + cached + in use is not every slot once": lambda p, slab, s: slab.free.append(0),
    "slab 0 miscounts its slots in use": lambda p, slab, s: setattr(slab, "num_in_use", 3),
    "free index is wrong": lambda p, slab, s: p._with_free[SlotKind.EXACT].clear(),
    "idle index is wrong": lambda p, slab, s: p._idle[SlotKind.EXACT].update({0: None}),
    "the counts of slots in use are wrong": lambda p, slab, s: p.num_in_use.update(
        {SlotKind.PAGE: 2}
    ),
    "an index names a slab that is gone": lambda p, slab, s: p._idle[SlotKind.PAGE].update(
        {2: None}
    ),
    "a slot in use lies in no slab": lambda p, slab, s: p._ref_count.update({p._stride * 9: 1}),
    "a slot in use has no reference": lambda p, slab, s: p._ref_count.update({s[0]: 0}),
    "cached slots and LRU list differ": lambda p, slab, s: p._lru[SlotKind.EXACT].clear(),
    "a cached slot has no key": lambda p, slab, s: p._by_key.pop(p._key_of.pop(s[2])),
    "the prefix map is not a map": lambda p, slab, s: p._by_key.update({"other": s[1]}),
}


@pytest.mark.parametrize("says", CORRUPTIONS)
def test_integrity_notices_every_corruption(says):
    p, slots = torn()
    CORRUPTIONS[says](p, p._slabs[0], slots)
    with pytest.raises(PoolError, match=f"^pool integrity: {re.escape(says)}$"):
        p.check_integrity()


def test_integrity_notices_an_empty_slab_that_is_held():
    p, slots = torn()
    slab_id = slots[0] // p._stride
    slab = p._slabs[slab_id]
    slab.free, slab.num_in_use, slab.cached = [p._stride * slab_id + i for i in range(4)], 0, set()
    del p._ref_count[slots[0]], p._ref_count[slots[1]]
    with pytest.raises(PoolError, match=f"slab {slab_id} is empty but held"):
        p.check_integrity()


def test_slots_wanted_again_are_neither_idle_nor_evicted():
    p = pool(slabs=1, exact=2, page=1)
    slot = p.allocate(SlotKind.EXACT)
    p.publish(slot, "a")
    p.release(slot)
    assert p.num_cached(SlotKind.EXACT) == 1 and p.num_in_use[SlotKind.EXACT] == 0
    p.acquire(slot)
    assert p.allocate(SlotKind.PAGE) is None and p.lookup("a") == slot
    p.acquire(slot)
    assert p.ref_count(slot) == 2 and not p.release(slot) and not p.release(slot)
    assert p.drop_cached() == 1 and p.lookup("a") is None and p.ref_count(slot) == 0


def test_what_is_not_in_use_cannot_be_unpublished():
    p = pool()
    slot = p.allocate(SlotKind.EXACT)
    p.unpublish(slot)
    p.publish(slot, "a")
    p.unpublish(slot)
    assert p.lookup("a") is None and p.release(slot)
    with pytest.raises(PoolError, match=f"^slot {slot} is not in use: it cannot be unpublished$"):
        p.unpublish(slot)


def test_slabs_that_are_needed_are_counted_by_kind():
    p = pool(slabs=9, exact=4, page=2)
    needed = [p.slabs_needed(*counts) for counts in ((0, 0), (1, 0), (4, 1), (5, 2), (8, 3))]
    assert needed == [0, 1, 2, 3, 4]


def test_the_slab_that_is_idle_longest_changes_kind_first():
    p = pool(slabs=2, exact=1, page=1)
    slots = [p.allocate(SlotKind.EXACT), p.allocate(SlotKind.EXACT)]
    for slot in reversed(slots):
        p.publish(slot, slot)
        p.release(slot)
    assert p.allocate(SlotKind.PAGE) is not None
    assert p.lookup(slots[1]) is None and p.lookup(slots[0]) == slots[0]


def test_a_slot_says_where_it_lies():
    p = pool(slabs=2, exact=4, page=2)
    slots = [p.allocate(SlotKind.EXACT) for _ in range(4)] + [p.allocate(SlotKind.PAGE)]
    places = [p.slab_and_index(slot) for slot in slots]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_bytes_follow_their_names_although_a_move_is_interrupted():
    held, calls = {}, []

    def move(moves):
        calls.append(moves)
        for _, source, target in moves:
            held[target] = held[source]
            if len(calls) == 1:
                raise KeyboardInterrupt

    pool = SlotPool(2, {SlotKind.EXACT: 4, SlotKind.PAGE: 1}, on_move=move)
    slots = [pool.allocate(SlotKind.EXACT) for _ in range(8)]
    for slot in slots[:2] + slots[4:6]:
        pool.release(slot)
    kept = slots[2:4] + slots[6:]
    held |= {slot: f"bytes of {slot}" for slot in kept}
    with pytest.raises(KeyboardInterrupt):
        pool.allocate(SlotKind.PAGE)
    pool.check_integrity()
    names = {source: target for _, source, target in calls[0]}
    assert len(names) == 2 and calls == [calls[0]] * 2
    for slot in kept:
        assert held[names.get(slot, slot)] == f"bytes of {slot}"
    assert pool.allocate(SlotKind.PAGE) is not None
