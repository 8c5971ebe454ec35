"""The slots of one sequence in one layer group grow, are sealed, slide, are shared and released.

```
spectral group   exact: [landmark pages | tail pages]      pages: [block 0, block 1, ...]
exact group      exact: [every page of the sequence]       pages: []
with a window    the same without what no later query sees
```

Pinned blocks are never sealed. Their exact pages stay between landmarks and tail, and their entry
in the page table is a hole: a negative number that page ops skip. Blocks that have left the window
are holes as well (decision 0034).
"""

from __future__ import annotations

from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.retention import Retention
from spectral_paged.cache.token_places import PAGES_PER_BLOCK, TokenPlaces, TokenRun
from spectral_paged.errors import PoolError
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.pool.arena import Arena
from spectral_paged.pool.block_table import BlockTable
from spectral_paged.pool.slot_pool import SlotKind

HOLE = -1  # page table entry of a pinned block, or of one that has left the window


class SequenceSlots(TokenPlaces):
    """One sequence's slots in one group, oldest first, and its row of the group's tables.

    Attributes:
        row: the sequence's row of the tables.
        retention: the group's retention.
        exact, pages: slots held; page slots past the sealed blocks are reserved for due seals.
    """

    __slots__ = (
        "_arena",
        "_exact_table",
        "_num_attached",
        "_num_dropped",
        "_num_encoded",
        "_num_published",
        "_page_table",
        "exact",
        "pages",
        "retention",
        "row",
    )

    def __init__(
        self,
        row: int,
        retention: Retention,
        arena: Arena,
        exact_table: BlockTable,
        page_table: BlockTable,
        pinned: tuple[int, ...] = (),
    ) -> None:
        super().__init__(retention.num_landmark_pages, pinned if retention.seals else ())
        self.row = row
        self.retention = retention
        self.exact: list[int] = []
        self.pages: list[int] = []
        self._arena = arena
        self._exact_table = exact_table
        self._page_table = page_table
        self._num_published = 0  # full exact pages that `publish_exact` has passed
        self._num_encoded = 0  # blocks whose pages are written, shown or not
        self._num_attached = 0  # blocks attached as pages by a prefix hit
        # blocks below it lost pages written ahead, and are sealed again only when due
        self._num_dropped = 0

    # ---- hold and release ----------------------------------------------------------------

    def hold(self, num_tokens: int, visible_blocks: int) -> bool:
        """Hold slots for `num_tokens` tokens and the pages of `visible_blocks` blocks; False, with
        nothing changed: not now."""
        num_pages = self.num_pages(self.retention.num_sealed(visible_blocks))
        return self._grow(self.num_exact(num_tokens), num_pages)

    def _grow(self, num_exact: int, num_pages: int) -> bool:
        """Hold at least so many slots of each kind; False, with nothing changed: not now."""
        before = len(self.exact), len(self.pages)
        if before[0] >= num_exact and before[1] >= num_pages:
            return True
        grown = False
        try:
            grown = self._allocate(self.exact, num_exact, SlotKind.EXACT) and self._allocate(
                self.pages, num_pages, SlotKind.PAGE
            )
        finally:
            if not grown:  # not now, or something raised
                self.shrink(*before)
        if grown:  # the page table shows no reserved page, so it stays as it is
            self._write_exact(before[0])
        return grown

    def _allocate(self, held: list[int], wanted: int, kind: SlotKind) -> bool:
        """Extend `held` to `wanted` slots; False if the pool has no more."""
        while len(held) < wanted:
            slot = self._arena.slots.allocate(kind)
            if slot is None:
                return False
            held.append(slot)  # at once, because the next allocation may move slots
        return True

    def shrink(self, num_exact: int, num_pages: int) -> None:
        """Release slots past the counts, which were reserved and not used."""
        for held, wanted in ((self.exact, num_exact), (self.pages, num_pages)):
            while len(held) > wanted:
                self._arena.slots.release(held.pop())
        self._write_exact(num_exact)

    def cancel(self, num_tokens: int) -> None:
        """Release the slots reserved for tokens past `num_tokens`."""
        self.shrink(self.num_exact(num_tokens), self.num_pages(self._num_written))

    def slide(self, num_tokens: int) -> None:
        """Release the slots that no query from position `num_tokens` on sees."""
        first = self.retention.first_page(num_tokens)
        if first <= self.first_page:
            return
        num_exact, num_pages = self.exact_place(first), self.num_pages(self.block_of(first))
        gone = self.exact[:num_exact] + self.pages[:num_pages]
        del self.exact[:num_exact], self.pages[:num_pages]
        self.first_page = first
        for slot in gone:
            self._arena.slots.release(slot)
        self._write_rows()

    def free(self, chain: PrefixChain | None = None) -> None:
        """Release every slot, the end of the sequence first and its landmarks last.

        Chains are then evicted from their ends, because a hit needs everything before its end.
        Exact pages that pages replaced were released earlier, oldest first; with the sequence's
        `chain` they move to their place in this order.
        """
        slots = self._arena.slots
        num_landmarks = max(0, self.num_landmark_pages - self.first_page)
        landmarks = self.exact[:num_landmarks]
        for slot in reversed(self.exact[num_landmarks:]):
            slots.release(slot)
        if chain is not None:
            first, end = map(self.first_index, (self._num_attached, self.num_sealed))
            first = max(first, self.first_page)
            for index in reversed(range(first, min(end, len(chain)))):
                slots.touch((SlotKind.EXACT, chain[index]))
        for slot in (*reversed(self.pages), *reversed(landmarks)):
            slots.release(slot)
        self._exact_table.write(self.row, 0, [])
        self._page_table.write(self.row, 0, [])

    def share(self, parent: SequenceSlots, num_tokens: int) -> bool:
        """Hold the slots of `parent` for `num_tokens` tokens: full ones are shared, a partial exact
        page is copied. False: not now; the caller then frees the slots held so far."""
        slots = self._arena.slots
        self._num_published, self.num_sealed = parent._num_published, parent.num_sealed
        self._num_encoded, self.first_page = parent._num_encoded, parent.first_page
        num_exact = parent.num_exact(num_tokens)
        partial = num_tokens % EXACT_PAGE_TOKENS != 0
        for slot in parent.pages[: parent.num_pages(parent._num_written)]:
            slots.acquire(slot)
            self.pages.append(slot)
        for slot in parent.exact[: num_exact - partial]:
            slots.acquire(slot)
            self.exact.append(slot)
        if partial:
            if not self._allocate(self.exact, num_exact, SlotKind.EXACT):
                return False
            self._arena.copy(SlotKind.EXACT, parent.exact[num_exact - 1], self.exact[-1])
        self._write_rows()
        return True

    def rename(self, names: dict[SlotKind, dict[int, int]]) -> None:
        """Replace the ids of slots that the pool moved; `names` has new ids by kind and old id."""
        self.exact[:] = [names[SlotKind.EXACT].get(s, s) for s in self.exact]
        self.pages[:] = [names[SlotKind.PAGE].get(s, s) for s in self.pages]
        self._write_rows()

    # ---- tables --------------------------------------------------------------------------

    def chunk_runs(self, num_tokens: int) -> tuple[TokenRun, ...]:
        """The runs of `num_tokens` tokens in the order of a chunk's keys: by position if a window
        cuts them, else pages first."""
        by_position = self.retention.window is not None
        return self.runs(num_tokens) if by_position else self.runs_by_kind(num_tokens)

    def _write_rows(self) -> None:
        self._write_exact(0)
        self._page_table.write(self.row, 0, self._page_row())

    def _write_exact(self, first: int) -> None:
        self._exact_table.write(self.row, first, self._exact_row(first))

    def _exact_row(self, first_exact: int) -> list[int]:
        """The units of the exact pages from index `first_exact` on."""
        unit = self._arena.unit
        return [unit(slot, SlotKind.EXACT) for slot in self.exact[first_exact:]]

    def _page_row(self) -> list[int]:
        """The units of the sealed blocks, oldest first; holes for pinned or gone ones."""
        pages, pinned, first = iter(self.pages), set(self.pinned), self.first_block
        return [
            HOLE
            if block < first or block in pinned
            else self._arena.unit(next(pages), SlotKind.PAGE)
            for block in range(self.num_sealed)
        ]

    def check_rows(self, name: str) -> None:
        """Raise PoolError unless the tables' rows match the slots of sequence `name`."""
        for table, held, kind in (
            (self._exact_table, self._exact_row(0), "EXACT"),
            (self._page_table, self._page_row(), "PAGE"),
        ):
            expected = held + [table.trash_unit] * (table.width - len(held))
            if table.host[self.row].tolist() != expected:
                raise PoolError(f"the {kind} table row of {name!r} is stale")

    # ---- prefix --------------------------------------------------------------------------

    def cached_exact(self, chain: PrefixChain, index: int) -> int | None:
        """The published slot of the exact page with tokens `64 index ...`, or None."""
        return self._arena.slots.lookup((SlotKind.EXACT, chain[index]))

    def cached_page(self, chain: PrefixChain, block: int) -> int | None:
        """The published slot of the page of `block`, or None."""
        last = self.last_index(block)
        if last >= len(chain):
            return None
        return self._arena.slots.lookup((SlotKind.PAGE, chain[last]))

    def attach(self, chain: PrefixChain, num_tokens: int, visible_blocks: int) -> None:
        """Acquire every slot of a prefix hit of `num_tokens` tokens, whose next query sees
        `visible_blocks` blocks as pages."""
        sealed = self.retention.num_sealed(visible_blocks)
        self.first_page = self.retention.first_page(num_tokens)
        for block in self.unpinned(range(self.first_block, sealed)):
            self._attach_slot(self.pages, self.cached_page(chain, block))
        for index in range(self.first_page, num_tokens // EXACT_PAGE_TOKENS):
            if not self.is_hidden(index, sealed):
                self._attach_slot(self.exact, self.cached_exact(chain, index))
        self.num_sealed = self._num_attached = sealed
        self._num_published = num_tokens // EXACT_PAGE_TOKENS
        self._write_rows()

    def _attach_slot(self, held: list[int], slot: int | None) -> None:
        assert slot is not None, "the hit was checked"
        self._arena.slots.acquire(slot)
        held.append(slot)

    def publish_exact(self, chain: PrefixChain, num_tokens: int) -> None:
        """Publish full exact pages under the keys of their prefix.

        If token ids came late, some pages were replaced by then or have left the window; those are
        skipped. Pages of a fork may have been published by another sequence.
        """
        full = min(num_tokens // EXACT_PAGE_TOKENS, len(chain))
        for index in range(max(self._num_published, self.first_page), full):
            if not self.is_sealed(index):
                self._publish(self.exact[self.exact_place(index)], SlotKind.EXACT, chain[index])
        self._num_published = max(self._num_published, full)

    def _publish(self, slot: int, kind: SlotKind, digest: bytes) -> None:
        if not self._arena.slots.is_published(slot):  # a fork may have published a shared slot
            self._arena.slots.publish(slot, (kind, digest))

    def forget(self, chain: PrefixChain | None) -> None:
        """Unpublish all slots of the sequence, and exact pages that its pages replaced."""
        for slot in (*self.exact, *self.pages):
            self._arena.slots.unpublish(slot)
        if chain is None:
            return
        for index in range(len(chain)):
            for kind in SlotKind:
                self._arena.slots.forget((kind, chain[index]))

    # ---- sealing -------------------------------------------------------------------------

    @property
    def _num_written(self) -> int:
        """The number of leading blocks that need no sealing any more."""
        return max(self.num_sealed, self._num_encoded, self.first_block)

    def due(self, visible_blocks: int) -> list[int]:
        """The blocks that must be sealed before a query sees `visible_blocks` as pages."""
        until = self.retention.num_sealed(visible_blocks)
        if until <= self.num_sealed:  # as in nearly every step
            return []
        return self.unpinned(range(self._num_written, until))

    def complete(self, num_tokens: int) -> int | None:
        """The next block to seal, if all of its tokens are among the first `num_tokens`."""
        block = self._num_written
        while block in self.pinned:
            block += 1
        end = (self.last_index(block) + 1) * EXACT_PAGE_TOKENS
        return block if end <= num_tokens and block >= self._num_dropped else None

    def reserve_page(self, block: int) -> bool:
        """Hold a page slot for a block that is not visible yet; False: not now."""
        return self._grow(len(self.exact), self.num_pages(block) + 1)

    def drop_ahead(self) -> bool:
        """Release pages of blocks that no query sees as pages yet; False if there are none. They
        are written again, byte for byte, when they are due."""
        if self._num_encoded <= self.num_sealed:
            return False
        self._num_dropped, self._num_encoded = self._num_encoded, self.num_sealed
        self.shrink(len(self.exact), self.num_sealed_pages)
        return True

    def _block_slots(self, block: int) -> list[int]:
        """The slots of the eight exact pages of a block in the tail."""
        start = self.exact_place(self.first_index(block))
        return self.exact[start : start + PAGES_PER_BLOCK]

    def _page_slot(self, block: int) -> int:
        """The slot of a block's page, written or reserved."""
        return self.pages[self.num_pages(block)]

    def block_units(self, block: int) -> tuple[list[int], int]:
        """The units of a tail block's eight exact pages and of its reserved page."""
        exact = [self._arena.unit(slot, SlotKind.EXACT) for slot in self._block_slots(block)]
        return exact, self._arena.unit(self._page_slot(block), SlotKind.PAGE)

    def note_encoded(self, block: int) -> bool:
        """Record that the page of `block` is written; False if it was written before."""
        self._num_encoded = max(self._num_encoded, block + 1)
        return block >= self._num_dropped

    def publish_sealed(self, chain: PrefixChain | None, visible_blocks: int) -> None:
        """Show the pages of `visible_blocks` blocks in the table, and release the exact pages that
        they replace."""
        num_sealed = self.retention.num_sealed(visible_blocks)
        if num_sealed == self.num_sealed:
            return
        replaced = []
        for block in self.unpinned(range(max(self.num_sealed, self.first_block), num_sealed)):
            last = self.last_index(block)
            if chain is not None and last < len(chain):
                self._publish(self._page_slot(block), SlotKind.PAGE, chain[last])
            replaced += self._block_slots(block)
        gone = set(replaced)
        self.exact[:] = [slot for slot in self.exact if slot not in gone]
        self.num_sealed = num_sealed
        for slot in reversed(replaced):
            self._arena.slots.release(slot)
        self._write_rows()
