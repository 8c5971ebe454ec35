"""The slot pool allocates, shares and evicts slots by id, in pure Python and O(1) a slot.

Memory is cut into slabs of equal size. A slab holds slots of one kind (exact pages or pages) and
may change kind when none of its slots is in use, so the split between kinds follows the workload.

```
slot states      free ----allocate----> in use (ref_count >= 1)
                  ^                       |  ^
                  |  evict        release |  | acquire (prefix hit)
                  +------- cached <-------+--+        (release without a key goes to free)
```

Every slot of a slab with a kind is in exactly one state; slabs without a kind are empty. Cached
slots of both kinds are evicted in the order of their last use: a chain that is released from its
end keeps its beginning longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import IntEnum

from spectral_paged.errors import PoolError


class SlotKind(IntEnum):
    """The kind of a slot: it holds an exact page (64 tokens) or a page (one sealed block)."""

    EXACT = 0
    PAGE = 1


@dataclass(slots=True)
class _Slab:
    kind: SlotKind
    free: list[int]
    num_in_use: int = 0
    cached: set[int] = field(default_factory=set)


class SlotPool:
    """Slots with reference counts, an LRU of cached slots and a map from prefix keys to slots.

    Args:
        num_slabs: slabs in the arena.
        slots_per_slab: slots in a slab, by kind; a kind that is missing or 0 has no slots.
        on_move: called with `[(kind, source, target), ...]` when slots in use move to free a slab.
            The callback must copy the bytes and rename the ids wherever they are kept. The pool
            calls it again if an exception interrupts it.
        on_free: called with `(kind, slot)` when a slot's bytes are no longer needed.
    """

    def __init__(
        self,
        num_slabs: int,
        slots_per_slab: dict[SlotKind, int],
        on_move: Callable[[list[tuple[SlotKind, int, int]]], None] | None = None,
        on_free: Callable[[SlotKind, int], None] | None = None,
    ) -> None:
        self.num_slabs = num_slabs
        self.slots_per_slab = slots_per_slab
        self.on_move = on_move
        self.on_free = on_free
        self._stride = max(slots_per_slab.values())
        self._slabs: dict[int, _Slab] = {}
        self._empty = list(range(num_slabs - 1, -1, -1))
        self._with_free: dict[SlotKind, OrderedDict[int, None]] = {
            k: OrderedDict() for k in SlotKind
        }
        self._idle: dict[SlotKind, OrderedDict[int, None]] = {k: OrderedDict() for k in SlotKind}
        # slot -> when it was last used; oldest first
        self._lru: dict[SlotKind, OrderedDict[int, int]] = {k: OrderedDict() for k in SlotKind}
        self._clock = 0
        self._ref_count: dict[int, int] = {}
        self._key_of: dict[int, Hashable] = {}
        self._by_key: dict[Hashable, int] = {}
        self._twin_key: dict[int, Hashable] = {}  # keys of slots in use that another slot carries
        self.num_in_use = dict.fromkeys(SlotKind, 0)
        self.num_evicted = 0
        self.num_moved = 0

    # ---- questions -----------------------------------------------------------------------

    def slab_and_index(self, slot: int) -> tuple[int, int]:
        """The slab of a slot and its index there: a slot id is `slab * stride + index`."""
        return divmod(slot, self._stride)

    def kind_of(self, slot: int) -> SlotKind:
        return self._slabs[slot // self._stride].kind

    def ref_count(self, slot: int) -> int:
        return self._ref_count.get(slot, 0)

    def num_cached(self, kind: SlotKind) -> int:
        return len(self._lru[kind])

    def slabs_needed(self, num_exact: int, num_pages: int) -> int:
        """The fewest slabs that hold so many slots of each kind."""
        return sum(
            -(-count // self.slots_per_slab[kind]) if count else 0
            for kind, count in ((SlotKind.EXACT, num_exact), (SlotKind.PAGE, num_pages))
        )

    def lookup(self, key: Hashable) -> int | None:
        """The slot published under `key`, cached or in use."""
        return self._by_key.get(key)

    def is_published(self, slot: int) -> bool:
        """True if a key finds the slot."""
        return slot in self._key_of

    # ---- transitions ---------------------------------------------------------------------

    def allocate(self, kind: SlotKind) -> int | None:
        """A slot with reference count 1; None means "not now".

        The pool tries in this order: a free slot of the kind, an empty slab, the least recently
        used of the cached slots of the kind and the idle slabs of the other kind, and a slab that
        it empties by moving slots together (decision 0004).
        """
        if not self.slots_per_slab.get(kind):
            return None
        slot = self._take_free(kind)
        if slot is None and (self._evict_oldest(kind) or self._pack()):
            slot = self._take_free(kind)
        return slot

    def _evict_oldest(self, kind: SlotKind) -> bool:
        """Evict cached slots until a slot of `kind` fits; False if no eviction would help."""
        slot, used = next(iter(self._lru[kind].items()), (None, self._clock + 1))
        for other in SlotKind:
            if other != kind and self._idle[other]:
                cached = self._slabs[next(iter(self._idle[other]))].cached
                # a slab is as old as its youngest slot
                if max(self._lru[other][s] for s in cached) < used:
                    for idle in sorted(cached):
                        self._evict(idle)
                    return True
        if slot is None:
            return False
        self._evict(slot)
        return True

    def _take_free(self, kind: SlotKind) -> int | None:
        if not self._with_free[kind]:
            if not self._empty:
                return None
            slab_id = self._empty.pop()
            base = slab_id * self._stride
            count = self.slots_per_slab[kind]
            self._slabs[slab_id] = _Slab(kind, list(range(base + count - 1, base - 1, -1)))
            self._with_free[kind][slab_id] = None
        slab_id = next(reversed(self._with_free[kind]))
        slab = self._slabs[slab_id]
        slot = slab.free.pop()
        if not slab.free:
            del self._with_free[kind][slab_id]
        slab.num_in_use += 1
        self._idle[kind].pop(slab_id, None)
        self._ref_count[slot] = 1
        self.num_in_use[kind] += 1
        return slot

    def acquire(self, slot: int) -> None:
        """Add a reference to a slot that is in use or cached."""
        count = self._ref_count.get(slot)
        if count is not None:
            self._ref_count[slot] = count + 1
            return
        slab_id = slot // self._stride
        slab = self._slabs.get(slab_id)
        if slab is None or slot not in slab.cached:
            raise PoolError(f"slot {slot} is free: it cannot be acquired (use after free)")
        slab.cached.discard(slot)
        del self._lru[slab.kind][slot]
        slab.num_in_use += 1
        self._idle[slab.kind].pop(slab_id, None)
        self._ref_count[slot] = 1
        self.num_in_use[slab.kind] += 1

    def release(self, slot: int) -> bool:
        """Drop a reference; True if the slot became free, so that its bytes are lost."""
        count = self._ref_count.get(slot)
        if count is None:
            raise PoolError(f"slot {slot} is not in use: double free")
        if count > 1:
            self._ref_count[slot] = count - 1
            return False
        del self._ref_count[slot]
        slab_id = slot // self._stride
        slab = self._slabs[slab_id]
        slab.num_in_use -= 1
        self.num_in_use[slab.kind] -= 1
        twin_key = self._twin_key.pop(slot, None)
        if twin_key is not None and twin_key not in self._by_key:
            self._by_key[twin_key] = slot  # the other slot is gone, so this one takes its key
            self._key_of[slot] = twin_key
        if slot in self._key_of:
            slab.cached.add(slot)
            self._clock += 1
            self._lru[slab.kind][slot] = self._clock
            self._note_idle(slab_id, slab)
            return False
        self.touch(twin_key)
        self._put_free(slab_id, slab, slot)
        return True

    def touch(self, key: Hashable) -> None:
        """Count the cached slot under `key`, if there is one, as used now."""
        slot = self._by_key.get(key)
        if slot is None or slot in self._ref_count:
            return
        kind, slab_id = self.kind_of(slot), slot // self._stride
        self._clock += 1
        self._lru[kind][slot] = self._clock
        self._lru[kind].move_to_end(slot)
        if slab_id in self._idle[kind]:
            self._idle[kind].move_to_end(slab_id)

    def publish(self, slot: int, key: Hashable) -> bool:
        """Let `key` find a slot in use; False if another slot already carries the key.

        The slot is then the other's twin: its release counts as a use of the other slot, or gives
        it the key if the other slot is gone.
        """
        if slot not in self._ref_count:
            raise PoolError(f"slot {slot} is not in use: it cannot be published")
        if slot in self._key_of:
            raise PoolError(f"slot {slot} is already published")
        if key in self._by_key:
            self._twin_key[slot] = key
            return False
        self._by_key[key] = slot
        self._key_of[slot] = key
        self._twin_key.pop(slot, None)
        return True

    def unpublish(self, slot: int) -> None:
        """Take the key, also as a twin, from a slot in use; a slot without a key stays as it is."""
        if slot not in self._ref_count:
            raise PoolError(f"slot {slot} is not in use: it cannot be unpublished")
        self._twin_key.pop(slot, None)
        key = self._key_of.pop(slot, None)
        if key is not None:
            del self._by_key[key]

    def forget(self, key: Hashable) -> None:
        """Remove `key`; a cached slot under it becomes free."""
        slot = self._by_key.get(key)
        if slot is None:
            return
        if slot in self._ref_count:
            self.unpublish(slot)
        else:
            self._evict(slot)

    def drop_cached(self) -> int:
        """Evict every cached slot; returns their number."""
        count = 0
        for lru in self._lru.values():
            while lru:
                self._evict(next(iter(lru)))
                count += 1
        return count

    # ---- slabs ---------------------------------------------------------------------------

    def _note_idle(self, slab_id: int, slab: _Slab) -> None:
        if slab.num_in_use == 0 and slab.cached:
            self._idle[slab.kind][slab_id] = None

    def _put_free(self, slab_id: int, slab: _Slab, slot: int, *, notify: bool = True) -> None:
        if notify and self.on_free is not None:
            self.on_free(slab.kind, slot)
        slab.free.append(slot)
        if slab.num_in_use == 0 and not slab.cached:
            del self._slabs[slab_id]
            self._with_free[slab.kind].pop(slab_id, None)
            self._idle[slab.kind].pop(slab_id, None)
            self._empty.append(slab_id)
            return
        self._with_free[slab.kind][slab_id] = None
        self._note_idle(slab_id, slab)

    def _evict(self, slot: int) -> None:
        slab_id = slot // self._stride
        slab = self._slabs[slab_id]
        slab.cached.remove(slot)
        del self._lru[slab.kind][slot]
        del self._by_key[self._key_of.pop(slot)]
        self.num_evicted += 1
        self._put_free(slab_id, slab, slot)

    def _pack(self) -> bool:
        """Empty one slab by moving its slots in use into other slabs of its kind."""
        needed = self.slabs_needed(self.num_in_use[SlotKind.EXACT], self.num_in_use[SlotKind.PAGE])
        if needed >= self.num_slabs:
            return False
        for kind in SlotKind:
            if not self.slots_per_slab.get(kind):
                continue
            slabs = [(s.num_in_use, i) for i, s in self._slabs.items() if s.kind == kind]
            per_slab = self.slots_per_slab[kind]
            if len(slabs) <= -(-self.num_in_use[kind] // per_slab):
                continue
            _, source_id = min(slabs)
            moves = []
            source = self._slabs[source_id]
            for slot in list(source.cached):
                self._evict(slot)
            base = source_id * self._stride
            for slot in range(base, base + per_slab):
                if slot in self._ref_count:
                    moves.append((kind, slot, self._move(slot, source_id, kind)))
            if moves and self.on_move is not None:
                try:
                    self.on_move(moves)
                except BaseException:  # ids are renamed already, so every byte must follow
                    self.on_move(moves)
                    raise
            if self.on_free is not None:
                for _, slot, _ in moves:
                    self.on_free(kind, slot)
            return True
        return False

    def _move(self, slot: int, source_id: int, kind: SlotKind) -> int:
        """Rename one slot in use into another slab of its kind; returns the new id."""
        target_id = next(
            i
            for i, s in self._slabs.items()
            if i != source_id and s.kind == kind and (s.free or s.cached)
        )
        target_slab = self._slabs[target_id]
        if not target_slab.free:
            self._evict(next(s for s in self._lru[kind] if s in target_slab.cached))
        target = target_slab.free.pop()
        if not target_slab.free:
            self._with_free[kind].pop(target_id, None)
        target_slab.num_in_use += 1
        self._idle[kind].pop(target_id, None)
        self._ref_count[target] = self._ref_count.pop(slot)
        if slot in self._key_of:
            key = self._key_of.pop(slot)
            self._key_of[target] = key
            self._by_key[key] = target
        if slot in self._twin_key:
            self._twin_key[target] = self._twin_key.pop(slot)
        source = self._slabs[source_id]
        source.num_in_use -= 1
        self.num_moved += 1
        # no `on_free` yet: the bytes are copied once every slot of the slab has its new id
        self._put_free(source_id, source, slot, notify=False)
        return target

    # ---- proof ---------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise PoolError unless every slot is in exactly one state and every index agrees."""

        def require(condition: bool, what: str, *of: int) -> None:
            if not condition:
                raise PoolError(f"pool integrity: {what.format(*of)}")

        require(len(set(self._empty)) == len(self._empty), "an empty slab is listed twice")
        require(not set(self._empty) & set(self._slabs), "a slab is both empty and held")
        require(len(self._empty) + len(self._slabs) == self.num_slabs, "a slab is lost")
        used: dict[int, list[int]] = {slab_id: [] for slab_id in self._slabs}
        for slot in self._ref_count:
            used.setdefault(slot // self._stride, []).append(slot)
        require(len(used) == len(self._slabs), "a slot in use lies in no slab")
        in_use = dict.fromkeys(SlotKind, 0)
        cached: dict[SlotKind, set[int]] = {k: set() for k in SlotKind}
        for slab_id, slab in self._slabs.items():
            base, free, held = slab_id * self._stride, slab.free, used[slab_id]
            require(len(set(free)) == len(free), "slab {} lists a free slot twice", slab_id)
            require(
                sorted([*free, *slab.cached, *held])
                == list(range(base, base + self.slots_per_slab[slab.kind])),
                "slab {}: free + cached + in use is not every slot once",
                slab_id,
            )
            require(len(held) == slab.num_in_use, "slab {} miscounts its slots in use", slab_id)
            require(bool(held or slab.cached), "slab {} is empty but held", slab_id)
            require(bool(free) == (slab_id in self._with_free[slab.kind]), "free index is wrong")
            require((not held) == (slab_id in self._idle[slab.kind]), "idle index is wrong")
            in_use[slab.kind] += len(held)
            cached[slab.kind] |= slab.cached
        require(in_use == self.num_in_use, "the counts of slots in use are wrong")
        require(all(c >= 1 for c in self._ref_count.values()), "a slot in use has no reference")
        for kind in SlotKind:
            named = {*self._with_free[kind], *self._idle[kind]}
            of_kind = {i for i, slab in self._slabs.items() if slab.kind == kind}
            require(named <= of_kind, "an index names a slab that is gone")
            require(cached[kind] == set(self._lru[kind]), "cached slots and LRU list differ")
            ages = list(self._lru[kind].values())
            require(ages == sorted(set(ages)), "the LRU list is out of order")
            require(all(s in self._key_of for s in cached[kind]), "a cached slot has no key")
        require(
            {k: s for s, k in self._key_of.items()} == self._by_key, "the prefix map is not a map"
        )
        require(set(self._twin_key) <= set(self._ref_count), "a twin is not in use")
