"""BlockPool against a plain model, and its refusals."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spectral_paged.block_pool import BlockPool, Kind
from spectral_paged.errors import PoolError


class PoolMachine(RuleBasedStateMachine):
    """The model: a list of references by token of ownership, and what each key should find."""

    def __init__(self):
        super().__init__()
        self.refs: list[tuple[int, int]] = []  # (slot, owner)
        self.content: dict[int, int] = {}  # slot -> owner that wrote it
        self.pool = BlockPool(4, {Kind.EXACT: 3, Kind.PAGE: 2}, on_move=self.move)
        self.next_owner = 0
        self.keys: dict[int, set[int]] = {}  # key -> owners that published it, all alike

    def move(self, moves):
        names = {}
        for _, source, target in moves:
            names[source] = target
            self.content[target] = self.content[source]
        self.refs = [(names.get(slot, slot), owner) for slot, owner in self.refs]

    @rule(kind=st.sampled_from(list(Kind)))
    def allocate(self, kind):
        used = {k: len({s for s, _ in self.refs if self.pool.kind_of(s) == k}) for k in Kind}
        slot = self.pool.allocate(kind)
        used[kind] += 1
        fits = self.pool.slabs_needed(used[Kind.EXACT], used[Kind.PAGE]) <= 4
        assert (slot is not None) == fits, "None exactly when packed slabs would not hold it"
        if slot is not None:
            assert slot not in {s for s, _ in self.refs}
            self.content[slot] = self.next_owner
            self.refs.append((slot, self.next_owner))
            self.next_owner += 1

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def share(self, data):
        slot, owner = data.draw(st.sampled_from(self.refs))
        self.pool.acquire(slot)
        self.refs.append((slot, owner))

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def release(self, data):
        i = data.draw(st.integers(0, len(self.refs) - 1))
        slot, _ = self.refs.pop(i)
        self.pool.release(slot)

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), key=st.integers(0, 20))
    def publish(self, data, key):
        slot, owner = data.draw(st.sampled_from(self.refs))
        try:
            known = self.pool.lookup(key)
            assert self.pool.publish(slot, key) == (known is None)
        except PoolError:
            return
        self.keys.setdefault(key, set()).add(owner)

    @rule(key=st.integers(0, 20))
    def hit(self, key):
        slot = self.pool.lookup(key)
        if slot is not None:
            self.pool.acquire(slot)
            assert self.content[slot] in self.keys[key], "a key finds what was published under it"
            self.refs.append((slot, self.content[slot]))

    @rule(key=st.integers(0, 20))
    def touch(self, key):
        self.pool.touch(key)

    @rule(key=st.integers(0, 20))
    def forget(self, key):
        self.pool.forget(key)
        assert self.pool.lookup(key) is None

    @rule()
    def drop(self):
        self.pool.drop_cached()

    @invariant()
    def whole(self):
        self.pool.check_integrity()
        for slot, owner in self.refs:
            assert self.content[slot] == owner
            assert self.pool.ref_count(slot) == sum(s == slot for s, _ in self.refs)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


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
