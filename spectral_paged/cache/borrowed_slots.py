"""Slots of one layer group that no sequence holds, while bytes come into them."""

from __future__ import annotations

from collections.abc import Callable

from spectral_paged.pool.arena import Arena
from spectral_paged.pool.slot_pool import SlotKind


class BorrowedSlots:
    """Slots that are kept from eviction, and follow the pool's moves, until they are released.

    Args:
        arena: the group's arena.
        settle: called before slots move: copies into them must be over, or be waited for by the
            device's later work.
    """

    def __init__(self, arena: Arena, settle: Callable[[], None]) -> None:
        self.slots: list[int] = []
        self._arena = arena
        self.settle = settle

    def acquire(self, key: tuple[SlotKind, bytes]) -> bool:
        """Keep the slot that is published under `key`; False if there is none."""
        slot = self._arena.slots.lookup(key)
        if slot is None:
            return False
        self._arena.slots.acquire(slot)
        self.slots.append(slot)
        return True

    def allocate(self, kind: SlotKind) -> int | None:
        """The index in `slots` of a new slot; None: not now."""
        slot = self._arena.slots.allocate(kind)
        if slot is None:
            return None
        self.slots.append(slot)
        return len(self.slots) - 1

    def publish(self, index: int, key: tuple[SlotKind, bytes]) -> None:
        self._arena.slots.publish(self.slots[index], key)

    def rename(self, names: dict[SlotKind, dict[int, int]]) -> None:
        """Replace the ids of slots that the pool moved."""
        for moved in names.values():
            self.slots[:] = [moved.get(slot, slot) for slot in self.slots]

    def release(self) -> None:
        """Give the slots back, the last first: published ones stay cached, others are free."""
        while self.slots:
            self._arena.slots.release(self.slots.pop())
