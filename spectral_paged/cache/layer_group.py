"""A layer group is a set of layers that share an arena, its block tables and a rotation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spectral_paged.cache.borrowed_slots import BorrowedSlots
from spectral_paged.cache.decode_rows import DecodeTable
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.prefix_tiles import PrefixTiles
from spectral_paged.cache.retention import Retention
from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.errors import PoolError
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.pages import PageFormat
from spectral_paged.pool.arena import Arena
from spectral_paged.pool.block_table import BlockTable
from spectral_paged.pool.slot_pool import SlotKind
from spectral_paged.pool.weak_method import WeakMethod
from spectral_paged.rope import RotaryTable


class LayerGroup:
    """The arena, block tables and rotation of `layers`; each sequence has a row of the tables.

    Args:
        layers: numbers of the model's layers in the group.
        arena: memory of the layers and the pool of its slots.
        retention: the tokens that the layers keep of a sequence, and their form.
        rope: rotary table of the layers' keys; None if they rotate nothing, or if blocks are never
            sealed and the rotation does not matter.
        max_rows, max_exact_pages, max_pages: sizes of the tables.
        seats_per_tile: most sequences of a tile that reads the pages they share; below 2 every
            sequence reads its own.

    Attributes:
        seals, window: the fields of `retention`.
        layout: layout of the group's pages; None if blocks are never sealed.
        tiles: finds sequences that begin with the same pages; None: pages are not shared. Under a
            sliding window queries see different tokens of a page, so none are.
    """

    def __init__(
        self,
        layers: list[int],
        arena: Arena,
        retention: Retention,
        rope: RotaryTable | None,
        *,
        max_rows: int,
        max_exact_pages: int,
        max_pages: int,
        seats_per_tile: int = 0,
    ) -> None:
        self.layers = layers
        self.arena = arena
        self.retention = retention
        self.rope = rope
        self.seals, self.window = retention.seals, retention.window
        self.layout = page_layout_of(arena.format, rope) if self.seals else None
        device, trash = arena.planes.device, arena.trash_unit
        empty = torch.zeros(0, 0, device=device)
        table = (empty, empty) if rope is None else (rope.cos, rope.sin)
        self.rotation = Rotation(*table, arena.format.num_landmark_tokens)
        self._places = {layer: i for i, layer in enumerate(layers)}
        self.exact_table = BlockTable(max_rows, max_exact_pages, trash, device)
        self.page_table = BlockTable(max_rows, max(max_pages, 1), trash, device)
        self.decode_table = DecodeTable(self.exact_table, self.page_table, self.window)
        self.tiles: PrefixTiles | None = None
        if self.seals and self.window is None and seats_per_tile >= 2:
            self.tiles = PrefixTiles(self.page_table, seats_per_tile)
        self._held: dict[int, SequenceSlots] = {}  # by row
        self.borrowed: list[BorrowedSlots] = []  # slots that no sequence holds
        arena.slots.on_move = WeakMethod(self._follow_moves)

    def plane(self, layer: int) -> Tensor:
        """The bytes of model layer `layer`, uint8 `[plane_bytes]`."""
        return self.arena.plane(self._places[layer])

    def in_halves(self, x: Tensor) -> Tensor:
        """Queries or keys `[..., D]` as pages and kernels take them: rotated pairs in halves."""
        return x if self.rope is None else self.rope.halves(x)

    def commit(self) -> None:
        """Copy the changed rows of both tables to the device."""
        self.exact_table.commit()
        self.page_table.commit()

    def take_row(self, row: int, pinned: tuple[int, ...] = ()) -> SequenceSlots:
        """A new sequence in `row`, without slots yet; its `pinned` blocks are never sealed."""
        slots = self._held[row] = self._slots(row, pinned)
        return slots

    def probe(self, pinned: tuple[int, ...]) -> SequenceSlots:
        """Slots of no sequence, which ask for cached slots and hold none."""
        return self._slots(-1, pinned)

    def _slots(self, row: int, pinned: tuple[int, ...]) -> SequenceSlots:
        return SequenceSlots(
            row, self.retention, self.arena, self.exact_table, self.page_table, pinned
        )

    def free_row(self, row: int, chain: PrefixChain | None = None) -> None:
        """Release the slots of the sequence in `row`, if there is one."""
        slots = self._held.pop(row, None)
        if slots is not None:
            slots.free(chain)

    def _follow_moves(self, moves: list[tuple[SlotKind, int, int]]) -> None:
        names: dict[SlotKind, dict[int, int]] = {kind: {} for kind in SlotKind}
        for borrowed in self.borrowed:
            borrowed.settle()
        for kind, source, target in moves:
            self.arena.copy(kind, source, target)
            names[kind][source] = target
        for slots in self._held.values():
            slots.rename(names)
        for borrowed in self.borrowed:
            borrowed.rename(names)

    def check_integrity(self, held: Mapping[str, SequenceSlots]) -> None:
        """Raise PoolError unless references and table rows agree with the sequences `held`."""
        self.arena.slots.check_integrity()
        references: Counter[int] = Counter()
        for seq_id, slots in held.items():
            references.update(slots.exact)
            references.update(slots.pages)
            slots.check_rows(seq_id)
        for borrowed in self.borrowed:
            references.update(borrowed.slots)
        counts = {slot: self.arena.slots.ref_count(slot) for slot in references}
        in_use = sum(self.arena.slots.num_in_use.values())
        if counts != dict(references) or in_use != len(references):
            raise PoolError("reference counts differ from what sequences hold")
        if self._held != {slots.row: slots for slots in held.values()}:
            raise PoolError("a group and the cache hold different sequences")


def page_layout_of(format: PageFormat, rope: RotaryTable | None) -> PageLayout:
    """The layout of pages by `format`; layers that rotate nothing store keys as `post` formats."""
    return format.layout if rope is not None else replace(format.layout, rope="post")
