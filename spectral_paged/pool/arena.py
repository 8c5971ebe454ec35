"""The arena of a layer group: one allocation, cut into slabs, with typed access to its slots.

```
planes uint8 [num_layers, plane_bytes]
plane  | slab 0 | slab 1 | ... | slab n-1 | trash |
slab   | page | page | ... | waste |   or   | exact | exact | exact | ... | waste |
```

A slot lies at the same unit (128 bytes) of every layer's plane; the trash slot takes padded reads
and writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.errors import CapacityError
from spectral_paged.kernels.page.layout import UNIT_BYTES
from spectral_paged.pages import PageFormat
from spectral_paged.pool.slot_pool import SlotKind, SlotPool
from spectral_paged.pool.weak_method import WeakMethod

POISON = 0xFF  # NaN in every float field: fp16, bf16 and fp32
MAX_SLOTS_PER_SLAB = 32


def choose_slab_bytes(exact_bytes: int, page_bytes: int) -> int:
    """The slab size in bytes that wastes least in either kind, with a small price on large slabs.

    `page_bytes` 0 means an arena of exact pages only, whose slabs are single exact pages.
    """
    if not page_bytes:
        return exact_bytes
    largest = max(exact_bytes, page_bytes)
    best, best_cost = largest, float("inf")
    for unit in (exact_bytes, page_bytes):
        for count in range(1, MAX_SLOTS_PER_SLAB + 1):
            size = unit * count
            if size < largest:
                continue
            waste = max(size % exact_bytes, size % page_bytes) / size
            cost = waste + 0.015 * size / largest
            if cost < best_cost:
                best, best_cost = size, cost
    return best


@dataclass(frozen=True, slots=True)
class SlabPlan:
    """The slabs that fit a layer group's bytes, known before they are allocated.

    Attributes:
        exact_bytes, page_bytes: of a slot in one layer; `page_bytes` is 0 where nothing is sealed.
    """

    exact_bytes: int
    page_bytes: int
    slab_bytes: int
    num_slabs: int

    @classmethod
    def of(
        cls,
        format: PageFormat,
        *,
        num_layers: int,
        itemsize: int,
        budget_bytes: int,
        exact_only: bool,
        total_bytes: int | None = None,
    ) -> SlabPlan:
        """Divide `budget_bytes` of all layers into slabs and a trash slot.

        Args:
            total_bytes: `kv_cache_bytes`, of which other groups have the rest; default
                `budget_bytes`.

        Raises:
            CapacityError: the budget holds less than two slabs.
        """
        exact_bytes = format.exact_page_bytes(itemsize)
        page_bytes = 0 if exact_only else format.page_bytes
        slab_bytes = choose_slab_bytes(exact_bytes, page_bytes)
        trash_bytes = max(exact_bytes, page_bytes)
        num_slabs = (budget_bytes // num_layers - trash_bytes) // slab_bytes
        if num_slabs < 2:
            need = num_layers * (2 * slab_bytes + trash_bytes)
            if total_bytes not in (None, budget_bytes):  # shares are rounded down
                need = -(-(need + 1) * total_bytes // max(1, budget_bytes))
            raise CapacityError(
                f"{budget_bytes} bytes for {num_layers} layers hold {max(num_slabs, 0)} slabs of "
                f"{slab_bytes} bytes a layer; at least 2 are needed: give kv_cache_bytes "
                f">= {need}"
            )
        return cls(exact_bytes, page_bytes, slab_bytes, num_slabs)


class Arena:
    """The memory of one layer group, with the pool of its slots.

    Args:
        format: the page format; `exact_only` arenas ignore its pages.
        num_layers: layers that share one pair of block tables.
        dtype: element type of exact pages.
        budget_bytes: bytes the planes may take, all layers counted.
        exact_only: True for layers whose blocks are never sealed.
        debug_poison: fill slots with 0xFF when they become free.

    Raises:
        CapacityError: the budget holds less than two slabs.
    """

    def __init__(
        self,
        format: PageFormat,
        *,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
        exact_only: bool,
        debug_poison: bool = False,
    ) -> None:
        self.format = format
        self.num_layers = num_layers
        self.dtype = dtype
        plan = SlabPlan.of(
            format,
            num_layers=num_layers,
            itemsize=dtype.itemsize,
            budget_bytes=budget_bytes,
            exact_only=exact_only,
        )
        self.exact_bytes, self.page_bytes = plan.exact_bytes, plan.page_bytes
        self.slab_bytes, num_slabs = plan.slab_bytes, plan.num_slabs
        trash_bytes = max(self.exact_bytes, self.page_bytes)
        slots = {SlotKind.EXACT: self.slab_bytes // self.exact_bytes}
        if self.page_bytes:
            slots[SlotKind.PAGE] = self.slab_bytes // self.page_bytes
        on_free = WeakMethod(self._poison) if debug_poison else None
        self.slots = SlotPool(num_slabs, slots, on_free=on_free)
        self.trash_unit = num_slabs * self.slab_bytes // UNIT_BYTES
        plane_bytes = num_slabs * self.slab_bytes + trash_bytes
        self.planes = torch.zeros(num_layers, plane_bytes, dtype=torch.uint8, device=device)
        self._poisoned_bytes = num_slabs * self.slab_bytes if debug_poison else 0
        self.planes[:, : self._poisoned_bytes] = POISON

    def give_back(self) -> None:
        """Free the memory, until `allocate`. Tensors over it stay, and are empty meanwhile."""
        self.planes.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Take the memory again that `give_back` freed; nothing is in its slots."""
        self.planes.untyped_storage().resize_(self.num_bytes)
        self.planes.zero_()
        self.planes[:, : self._poisoned_bytes] = POISON

    @property
    def num_bytes(self) -> int:
        return self.planes.numel()

    def plane(self, layer_index: int) -> Tensor:
        """The bytes of one layer of the group, uint8 `[plane_bytes]`."""
        return self.planes[layer_index]

    def slot_bytes(self, kind: SlotKind) -> int:
        return self.exact_bytes if kind == SlotKind.EXACT else self.page_bytes

    def unit(self, slot: int, kind: SlotKind) -> int:
        """The 128-byte unit of every plane at which a slot starts."""
        slab, index = self.slots.slab_and_index(slot)
        return (slab * self.slab_bytes + index * self.slot_bytes(kind)) // UNIT_BYTES

    def span(self, slot: int, kind: SlotKind) -> Tensor:
        """The bytes of a slot in every layer, uint8 `[num_layers, slot_bytes]`, of wide strides."""
        start = self.unit(slot, kind) * UNIT_BYTES
        return self.planes[:, start : start + self.slot_bytes(kind)]

    def _poison(self, kind: SlotKind, slot: int) -> None:
        self.span(slot, kind).fill_(POISON)

    def copy(self, kind: SlotKind, source: int, target: int) -> None:
        """Copy a slot's bytes in every layer."""
        self.span(target, kind).copy_(self.span(source, kind))
