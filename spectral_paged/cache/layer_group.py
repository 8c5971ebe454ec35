"""A set of layers that share tables: which slots hold which sequence's tokens.

```
spectral group   exact: [landmark pages | tail pages]      pages: [block 0, block 1, ...]
exact group      exact: [every page of the sequence]       pages: []
with a window    the same without what no later query sees
```

Blocks that a caller pinned are never sealed. Their exact pages stay between landmarks and tail, and
their entry in the page table is negative: a hole that page ops skip. So is that of a block that has
left the window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectral_paged.cache.layer_spec import LayerSpec
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.sequence_slots import PAGES_PER_BLOCK, GroupSlots, Run, first_seen_page
from spectral_paged.errors import PoolError
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS, PageLayout
from spectral_paged.pages import PageFormat
from spectral_paged.pool.arena import Arena
from spectral_paged.pool.block_table import BlockTable
from spectral_paged.pool.slot_pool import SlotKind
from spectral_paged.pool.weak_method import WeakMethod

HOLE = -1  # page table entry of a pinned block, or of one that has left the window


class LayerGroup:
    """Slots, tables and sealing for `layers`; the pool decides who owns what.

    Attributes:
        rope: by what the layers' keys are turned; None where they are not, or where blocks are
            never sealed and nobody has to know.
        window: tokens that a query sees, its own among them; None: all before it.
        layout: of the group's pages; None where blocks are never sealed.
    """

    def __init__(
        self,
        layers: list[int],
        arena: Arena,
        spec: LayerSpec,
        *,
        seals: bool,
        max_rows: int,
        max_exact_pages: int,
        max_pages: int,
    ) -> None:
        self.layers = layers
        self.arena = arena
        self.seals = seals
        self.rope, self.window = spec.rope if seals else None, spec.window
        self.layout = page_layout_of(arena.format, spec) if seals else None
        device, trash = arena.planes.device, arena.trash_unit
        empty = torch.zeros(0, 0, device=device)
        self.cos = empty if self.rope is None else self.rope.cos
        self.sin = empty if self.rope is None else self.rope.sin
        self._places = {layer: i for i, layer in enumerate(layers)}
        self.num_landmark_pages = arena.format.num_landmark_tokens // EXACT_PAGE_TOKENS
        self.exact_table = BlockTable(max_rows, max_exact_pages, trash, device)
        self.page_table = BlockTable(max_rows, max(max_pages, 1), trash, device)
        self.sequences: dict[str, GroupSlots] = {}
        arena.slots.on_move = WeakMethod(self._follow_moves)

    def plane(self, layer: int) -> Tensor:
        """uint8 `[plane_bytes]` of model layer `layer`."""
        return self.arena.plane(self._places[layer])

    def in_halves(self, x: Tensor) -> Tensor:
        """Queries or keys `[..., D]` as pages and kernels take them: rotated pairs in halves."""
        return x if self.rope is None else self.rope.halves(x)

    # ---- slots ---------------------------------------------------------------------------

    def blocks_sealed(self, visible_blocks: int) -> int:
        """Blocks this group holds as pages when the format says `visible_blocks`."""
        return visible_blocks if self.seals else 0

    def add(self, seq_id: str, row: int, pinned: tuple[int, ...] = ()) -> GroupSlots:
        pinned = pinned if self.seals else ()
        slots = self.sequences[seq_id] = GroupSlots(row, self.num_landmark_pages, pinned)
        return slots

    def first_page(self, num_tokens: int) -> int:
        """Spans of 64 tokens, or blocks of them, that no query from `num_tokens` on sees."""
        return first_seen_page(
            num_tokens,
            window=self.window,
            num_landmark_pages=self.num_landmark_pages,
            seals=self.seals,
        )

    def slide(self, seq_id: str, num_tokens: int) -> None:
        """Give back what no query from position `num_tokens` on sees."""
        slots, first = self.sequences[seq_id], self.first_page(num_tokens)
        if first <= slots.first_page:
            return
        num_exact, num_pages = slots.exact_place(first), slots.num_pages(slots.block_of(first))
        gone = slots.exact[:num_exact] + slots.pages[:num_pages]
        del slots.exact[:num_exact], slots.pages[:num_pages]
        slots.first_page = first
        for slot in gone:
            self.arena.slots.release(slot)
        self._write_rows(slots, 0)

    def pages_sealed(self, seq_id: str, visible_blocks: int) -> int:
        """Pages this group holds of a sequence when the format says `visible_blocks`."""
        return self.sequences[seq_id].num_pages(self.blocks_sealed(visible_blocks))

    def grow(self, seq_id: str, num_exact: int, num_pages: int) -> bool:
        """Hold at least so many exact pages and page slots; False (and unchanged): not now."""
        slots = self.sequences[seq_id]
        before = len(slots.exact), len(slots.pages)
        if before[0] >= num_exact and before[1] >= num_pages:
            return True
        grown = False
        try:
            grown = self._allocate(slots.exact, num_exact, SlotKind.EXACT) and self._allocate(
                slots.pages, num_pages, SlotKind.PAGE
            )
        finally:
            if not grown:  # not now, or something raised
                self.shrink(seq_id, *before)
        if grown:
            self._write_rows(slots, before[0])
        return grown

    def _allocate(self, held: list[int], wanted: int, kind: SlotKind) -> bool:
        """Let `held` have at least `wanted` slots; False where the pool has no more."""
        while len(held) < wanted:
            slot = self.arena.slots.allocate(kind)
            if slot is None:
                return False
            held.append(slot)  # at once: the pool may move slots while allocating the next one
        return True

    def shrink(self, seq_id: str, num_exact: int, num_pages: int) -> None:
        """Give back slots past the counts (a reservation that was not used)."""
        slots = self.sequences[seq_id]
        for held, wanted in ((slots.exact, num_exact), (slots.pages, num_pages)):
            while len(held) > wanted:
                self.arena.slots.release(held.pop())
        self._write_rows(slots, num_exact)

    def free(self, seq_id: str, chain: PrefixChain | None = None) -> None:
        """Release everything, the end of the sequence first and its landmarks last.

        So chains are evicted from their ends: what begins one is of use without what follows, and
        never the other way round. Exact pages that pages replaced were released when they were,
        oldest first; with the sequence's `chain` they get their place here.
        """
        slots = self.sequences.pop(seq_id)
        num_landmarks = max(0, self.num_landmark_pages - slots.first_page)
        landmarks = slots.exact[:num_landmarks]
        for slot in reversed(slots.exact[num_landmarks:]):
            self.arena.slots.release(slot)
        if chain is not None:
            first, end = map(slots.first_index, (slots.num_attached, slots.num_sealed))
            first = max(first, slots.first_page)
            for index in reversed(range(first, min(end, len(chain)))):
                self.arena.slots.touch((SlotKind.EXACT, chain[index]))
        for slot in (*reversed(slots.pages), *reversed(landmarks)):
            self.arena.slots.release(slot)
        self.exact_table.write(slots.row, 0, [])
        self.page_table.write(slots.row, 0, [])

    def fork(self, parent_id: str, child_id: str, row: int, num_tokens: int) -> bool:
        """Share full slots, copy the partial exact page; False (and nothing added): not now."""
        parent = self.sequences[parent_id]
        child = self.add(child_id, row, parent.pinned)
        child.num_published, child.num_sealed = parent.num_published, parent.num_sealed
        child.num_encoded, child.first_page = parent.num_encoded, parent.first_page
        num_exact = parent.num_exact(num_tokens)
        partial = num_tokens % EXACT_PAGE_TOKENS != 0
        for slot in parent.pages[: parent.num_pages(parent.num_written)]:
            self.arena.slots.acquire(slot)
            child.pages.append(slot)
        for slot in parent.exact[: num_exact - partial]:
            self.arena.slots.acquire(slot)
            child.exact.append(slot)
        if partial:
            copy = self.arena.slots.allocate(SlotKind.EXACT)
            if copy is None:
                self.free(child_id)
                return False
            child.exact.append(copy)
            self.arena.copy(SlotKind.EXACT, parent.exact[num_exact - 1], copy)
        self._write_rows(child, 0)
        return True

    def runs(self, seq_id: str, num_tokens: int) -> tuple[Run, ...]:
        """Where a sequence's tokens are, in the order in which a chunk's keys are laid out: by
        position where a window cuts them, else pages first, which takes fewer reads."""
        slots = self.sequences[seq_id]
        if self.window is not None:
            return slots.runs(num_tokens)
        sealed, exact = slots.num_sealed_pages * BLOCK_TOKENS, num_tokens - slots.tail_start
        pages = Run(True, 0, slots.num_sealed, sealed)
        tail = Run(False, 0, -(-exact // EXACT_PAGE_TOKENS), exact)
        return (pages, tail) if sealed else (tail,)

    def _write_rows(self, slots: GroupSlots, first_exact: int) -> None:
        unit = self.arena.unit
        changed = [unit(s, SlotKind.EXACT) for s in slots.exact[first_exact:]]
        self.exact_table.write(slots.row, first_exact, changed)
        self.page_table.write(slots.row, 0, self._page_row(slots))

    def _page_row(self, slots: GroupSlots) -> list[int]:
        """Units of the sealed blocks, oldest first; a hole for a pinned one."""
        pages, pinned, first = iter(slots.pages), set(slots.pinned), slots.first_block
        return [
            HOLE
            if block < first or block in pinned
            else self.arena.unit(next(pages), SlotKind.PAGE)
            for block in range(slots.num_sealed)
        ]

    def _follow_moves(self, moves: list[tuple[SlotKind, int, int]]) -> None:
        names: dict[SlotKind, dict[int, int]] = {SlotKind.EXACT: {}, SlotKind.PAGE: {}}
        for kind, source, target in moves:
            self.arena.copy(kind, source, target)
            names[kind][source] = target
        for slots in self.sequences.values():
            slots.exact[:] = [names[SlotKind.EXACT].get(s, s) for s in slots.exact]
            slots.pages[:] = [names[SlotKind.PAGE].get(s, s) for s in slots.pages]
            self._write_rows(slots, 0)

    # ---- prefix --------------------------------------------------------------------------

    def cached_exact(self, chain: PrefixChain, index: int) -> int | None:
        """Slot of the exact page with tokens `64 index ...`, if it is known."""
        return self.arena.slots.lookup((SlotKind.EXACT, chain[index]))

    def cached_page(self, chain: PrefixChain, block: int) -> int | None:
        """Slot of the page of `block`, if it is known."""
        last = self._last_index(block)
        return self.arena.slots.lookup((SlotKind.PAGE, chain[last])) if last < len(chain) else None

    def attach(self, seq_id: str, chain: PrefixChain, num_tokens: int, num_sealed: int) -> None:
        """Take references on every slot of a prefix hit of `num_tokens` tokens."""
        slots = self.sequences[seq_id]
        blocks = self.arena.slots
        sealed = self.blocks_sealed(num_sealed)
        slots.first_page = self.first_page(num_tokens)
        for block in self._unpinned(slots, range(slots.first_block, sealed)):
            slot = self.cached_page(chain, block)
            assert slot is not None, "the hit was checked"
            blocks.acquire(slot)
            slots.pages.append(slot)
        for index in range(slots.first_page, num_tokens // EXACT_PAGE_TOKENS):
            if self.is_hidden(index, sealed, slots.pinned):
                continue
            slot = self.cached_exact(chain, index)
            assert slot is not None, "the hit was checked"
            blocks.acquire(slot)
            slots.exact.append(slot)
        slots.num_sealed = slots.num_attached = sealed
        slots.num_published = num_tokens // EXACT_PAGE_TOKENS
        self._write_rows(slots, 0)

    def publish_exact(self, seq_id: str, chain: PrefixChain, num_tokens: int) -> None:
        """Let full exact pages be found by their prefix.

        Those that a page replaced or that left the window are gone where token ids came late. A
        fork's may have been published by another.
        """
        slots = self.sequences[seq_id]
        full = min(num_tokens // EXACT_PAGE_TOKENS, len(chain))
        for index in range(max(slots.num_published, slots.first_page), full):
            if slots.is_sealed(index):
                continue
            slot = slots.exact[slots.exact_place(index)]
            if not self.arena.slots.is_published(slot):
                self.arena.slots.publish(slot, (SlotKind.EXACT, chain[index]))
        slots.num_published = max(slots.num_published, full)

    def forget(self, seq_id: str, chain: PrefixChain | None) -> None:
        """Let nobody find what the sequence stored, what its pages replaced included."""
        slots = self.sequences[seq_id]
        for slot in (*slots.exact, *slots.pages):
            self.arena.slots.unpublish(slot)
        if chain is None:
            return
        for index in range(len(chain)):
            for kind in SlotKind:
                self.arena.slots.forget((kind, chain[index]))

    # ---- proof ---------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise PoolError unless references and table rows agree with the sequences."""
        self.arena.slots.check_integrity()
        references: Counter[int] = Counter()
        for seq_id, slots in self.sequences.items():
            references.update(slots.exact)
            references.update(slots.pages)
            exact_row = [self.arena.unit(s, SlotKind.EXACT) for s in slots.exact]
            for table, held, name in (
                (self.exact_table, exact_row, "EXACT"),
                (self.page_table, self._page_row(slots), "PAGE"),
            ):
                expected = held + [table.trash_unit] * (table.width - len(held))
                if table.host[slots.row].tolist() != expected:
                    raise PoolError(f"the {name} table row of {seq_id!r} is stale")
        counts = {slot: self.arena.slots.ref_count(slot) for slot in references}
        in_use = sum(self.arena.slots.num_in_use.values())
        if counts != dict(references) or in_use != len(references):
            raise PoolError("reference counts differ from what sequences hold")

    # ---- sealing -------------------------------------------------------------------------

    def due(self, seq_id: str, visible_blocks: int) -> list[int]:
        """Blocks that must be sealed now."""
        slots, until = self.sequences[seq_id], self.blocks_sealed(visible_blocks)
        if until <= slots.num_sealed:  # as in nearly every step
            return []
        return self._unpinned(slots, range(slots.num_written, until))

    def complete(self, seq_id: str, num_tokens: int) -> int | None:
        """The next block to seal, if all of its tokens are among the first `num_tokens`."""
        slots = self.sequences[seq_id]
        block = slots.num_written
        while block in slots.pinned:
            block += 1
        end = (self._last_index(block) + 1) * EXACT_PAGE_TOKENS
        return block if self.seals and end <= num_tokens and block >= slots.num_dropped else None

    def _last_index(self, block: int) -> int:
        """The last span of 64 tokens of `block`."""
        return self.num_landmark_pages + (block + 1) * PAGES_PER_BLOCK - 1

    def reserve_page(self, seq_id: str, block: int) -> bool:
        """Hold a page slot for a block that is not visible yet; False: not now."""
        slots = self.sequences[seq_id]
        return self.grow(seq_id, len(slots.exact), slots.num_pages(block) + 1)

    def note_encoded(self, seq_id: str, block: int) -> bool:
        """The page of `block` is written; False where it was written before."""
        slots = self.sequences[seq_id]
        slots.num_encoded = max(slots.num_encoded, block + 1)
        return block >= slots.num_dropped

    def drop_ahead(self, seq_id: str) -> bool:
        """Give back pages of blocks that no query sees as pages yet; False where there are none.
        They are written again, the same, when they are due."""
        slots = self.sequences[seq_id]
        if slots.num_encoded <= slots.num_sealed:
            return False
        slots.num_dropped, slots.num_encoded = slots.num_encoded, slots.num_sealed
        self.shrink(seq_id, len(slots.exact), slots.num_sealed_pages)
        return True

    def cancel(self, seq_id: str, num_tokens: int) -> None:
        """Give back what was reserved for tokens past `num_tokens`."""
        slots = self.sequences[seq_id]
        num_written = slots.num_pages(slots.num_written)
        self.shrink(seq_id, slots.num_exact(num_tokens), num_written)

    @staticmethod
    def _unpinned(slots: GroupSlots, blocks: range) -> list[int]:
        return [block for block in blocks if block not in slots.pinned]

    def is_hidden(self, index: int, sealed: int, pinned: tuple[int, ...]) -> bool:
        """True if a page stands for the exact page `index` when `sealed` blocks are sealed."""
        block = (index - self.num_landmark_pages) // PAGES_PER_BLOCK
        return 0 <= block < sealed and block not in pinned

    def block_units(self, seq_id: str, block: int) -> tuple[list[int], int]:
        """Units of a tail block's eight exact pages and of the page reserved for it."""
        slots = self.sequences[seq_id]
        start = slots.exact_place(slots.first_index(block))
        exact = slots.exact[start : start + PAGES_PER_BLOCK]
        page = slots.pages[slots.num_pages(block)]
        units = [self.arena.unit(slot, SlotKind.EXACT) for slot in exact]
        return units, self.arena.unit(page, SlotKind.PAGE)

    def publish_sealed(self, seq_id: str, chain: PrefixChain | None, num_sealed: int) -> None:
        """Show pages up to `num_sealed` in the table and free the exact pages they replace."""
        slots = self.sequences[seq_id]
        if num_sealed == slots.num_sealed:
            return
        shown = range(max(slots.num_sealed, slots.first_block), num_sealed)
        blocks = self._unpinned(slots, shown)
        replaced = []
        for block in blocks:
            last = self._last_index(block)
            if chain is not None and last < len(chain):
                page = slots.pages[slots.num_pages(block)]
                if not self.arena.slots.is_published(page):  # else by a fork that shares it
                    self.arena.slots.publish(page, (SlotKind.PAGE, chain[last]))
            start = slots.exact_place(slots.first_index(block))
            replaced += slots.exact[start : start + PAGES_PER_BLOCK]
        gone = set(replaced)
        slots.exact[:] = [slot for slot in slots.exact if slot not in gone]
        slots.num_sealed = num_sealed
        for slot in reversed(replaced):
            self.arena.slots.release(slot)
        self._write_rows(slots, 0)


def page_layout_of(format: PageFormat, spec: LayerSpec) -> PageLayout:
    """Pages of layers that turn no key hold them as they come, as a `post` format's do."""
    return format.layout if spec.rope is not None else replace(format.layout, rope="post")


def reserve_slots(
    groups: Sequence[LayerGroup], seq_id: str, num_tokens: int, visible_blocks: int
) -> bool:
    """Hold, in every group, slots for `num_tokens` tokens of a sequence and for the pages of
    `visible_blocks` blocks, if need be in place of pages written ahead. False: not now."""
    if _grow_all(groups, seq_id, num_tokens, visible_blocks):
        return True
    dropped = [group.drop_ahead(seq_id) for group in groups]
    return any(dropped) and _grow_all(groups, seq_id, num_tokens, visible_blocks)


def _grow_all(
    groups: Sequence[LayerGroup], seq_id: str, num_tokens: int, visible_blocks: int
) -> bool:
    """False, and nothing changed: not now."""
    before = [(len(g.sequences[seq_id].exact), len(g.sequences[seq_id].pages)) for g in groups]
    for done, group in enumerate(groups):
        num_exact = group.sequences[seq_id].num_exact(num_tokens)
        if not group.grow(seq_id, num_exact, group.pages_sealed(seq_id, visible_blocks)):
            for earlier, counts in zip(groups[:done], before[:done], strict=True):
                earlier.shrink(seq_id, *counts)
            return False
    return True
