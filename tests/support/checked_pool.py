"""A slot pool beside a plain model of it, compared after every operation."""

from __future__ import annotations

from spectral_paged.errors import PoolError
from spectral_paged.pool.slot_pool import SlotKind, SlotPool


class CheckedPool:
    """A `SlotPool`, and the references, contents and keys that it should have.

    Attributes:
        refs: a (slot, owner) pair for each reference.
        content: the owner that wrote a slot; dropped when the pool reports the slot as free.
        released: published slots without references, the one used longest ago first.
        twins: slots in use whose key another slot carries.
    """

    def __init__(self, num_slabs=4, slots_per_slab=None):
        slots_per_slab = slots_per_slab or {SlotKind.EXACT: 3, SlotKind.PAGE: 2}
        self.pool = SlotPool(num_slabs, slots_per_slab, on_move=self._move, on_free=self._free)
        self.refs: list[tuple[int, int]] = []
        self.content: dict[int, int] = {}
        self.keys: dict[int, set[int]] = {}  # key to the owners that published it, all alike
        self.twins: dict[int, int] = {}
        self.released: dict[int, SlotKind] = {}
        self.kinds: dict[int, SlotKind] = {}
        self.num_owners = self.num_evicted = self.num_moved = 0

    def _move(self, moves):
        assert moves, "nothing is moved"
        self.num_moved += len(moves)
        names = {source: target for _, source, target in moves}
        assert len(set(names.values())) == len(moves) and not names.keys() & set(names.values())
        for kind, source, target in moves:
            assert self.kinds[source] == kind
            self.kinds[target] = kind
            assert target not in self.content, "a slot that is wanted was written over"
            self.content[target] = self.content[source]
        self.refs = [(names.get(slot, slot), owner) for slot, owner in self.refs]
        self.twins = {names.get(slot, slot): key for slot, key in self.twins.items()}

    def _free(self, kind, slot):
        assert self.kinds[slot] == kind
        del self.content[slot]
        self.num_evicted += self.released.pop(slot, None) is not None

    def _in_use(self, kind):
        return {slot for slot, _ in self.refs if self.pool.kind_of(slot) == kind}

    def allocate(self, kind):
        """Take a slot; the pool must refuse exactly if packed slabs have no room for one more."""
        pool, before = self.pool, dict(self.released)
        used = {k: len(self._in_use(k)) for k in SlotKind}
        used[kind] += 1
        fits = bool(pool.slots_per_slab.get(kind)) and (
            pool.slabs_needed(used[SlotKind.EXACT], used[SlotKind.PAGE]) <= pool.num_slabs
        )
        moved = pool.num_moved
        slot = pool.allocate(kind)
        assert (slot is not None) == fits
        if slot is None:
            assert before == self.released, "what cannot be is refused before anything is evicted"
            return
        gone = [s for s in before if s not in self.released]
        if len(gone) == 1 and before[gone[0]] == kind and moved == pool.num_moved:
            assert gone[0] == next(s for s, k in before.items() if k == kind), "LRU goes first"
        assert slot not in self.content and pool.ref_count(slot) == 1
        self.content[slot], self.kinds[slot] = self.num_owners, kind
        self.refs.append((slot, self.num_owners))
        self.num_owners += 1

    def share(self, index):
        slot, owner = self.refs[index]
        self.pool.acquire(slot)
        self.refs.append((slot, owner))

    def release(self, index):
        slot, _ = self.refs.pop(index)
        kind, last = self.pool.kind_of(slot), all(s != slot for s, _ in self.refs)
        found = self.pool.is_published(slot)
        twin = self.twins.pop(slot, None) if last else None
        if twin is not None:
            found = self.pool.lookup(twin) is None  # the twin inherits the key of a slot that left
        if last and found:
            self.released[slot] = kind
        assert self.pool.release(slot) == (last and not found)
        if last and not found and twin is not None:
            self._use(twin)

    def _use(self, key):
        slot = self.pool.lookup(key)
        if slot in self.released:
            self.released[slot] = self.released.pop(slot)

    def publish(self, index, key):
        slot, owner = self.refs[index]
        taken = self.pool.lookup(key) is not None
        if self.pool.is_published(slot):
            try:
                self.pool.publish(slot, key)
            except PoolError:
                return
            raise AssertionError("a slot was published twice")
        assert self.pool.publish(slot, key) != taken
        self.keys.setdefault(key, set()).add(owner)
        self.twins.pop(slot, None)
        if taken:
            self.twins[slot] = key

    def unpublish(self, index):
        self.pool.unpublish(self.refs[index][0])
        self.twins.pop(self.refs[index][0], None)
        assert not self.pool.is_published(self.refs[index][0])

    def hit(self, key):
        """Look a key up and take a reference; the slot must have been published under that key."""
        slot = self.pool.lookup(key)
        if slot is not None:
            self.pool.acquire(slot)
            self.released.pop(slot, None)
            assert self.content[slot] in self.keys[key]
            self.refs.append((slot, self.content[slot]))

    def touch(self, key):
        self._use(key)
        self.pool.touch(key)

    def forget(self, key):
        self.pool.forget(key)
        assert self.pool.lookup(key) is None

    def drop(self):
        count = len(self.released)
        assert self.pool.drop_cached() == count and not self.released

    def any_operation(self, rng):
        """Do a random operation; references are released as fast as they are taken."""
        refs, what = len(self.refs), rng.random()
        if what < 0.35 or not refs:
            self.allocate(rng.choice(list(SlotKind)))
        elif what < 0.70 or refs > 40:
            self.release(rng.randrange(refs))
        elif what < 0.75:
            self.share(rng.randrange(refs))
        elif what < 0.90:
            self.publish(rng.randrange(refs), rng.randrange(30))
        elif what < 0.92:
            self.unpublish(rng.randrange(refs))
        elif what < 0.94:
            self.touch(rng.randrange(30))
        elif what < 0.95:
            self.forget(rng.randrange(30))
        elif what < 0.998:
            self.hit(rng.randrange(30))
        else:
            self.drop()

    def check(self):
        pool = self.pool
        pool.check_integrity()
        assert (pool.num_evicted, pool.num_moved) == (self.num_evicted, self.num_moved)
        counts: dict[int, int] = {}
        for slot, owner in self.refs:
            assert self.content[slot] == owner, f"slot {slot} no longer holds what was written"
            counts[slot] = counts.get(slot, 0) + 1
        assert all(pool.ref_count(slot) == count for slot, count in counts.items())
        assert self.content.keys() == counts.keys() | self.released.keys()
        for kind in SlotKind:
            assert pool.num_cached(kind) == sum(k == kind for k in self.released.values())
        for slot in self.released:
            assert pool.is_published(slot), "what was published stays findable until it is evicted"
