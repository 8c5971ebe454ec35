"""The slots that one sequence holds in one layer group: grow, seal, slide, share, give back.

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
    """One sequence's slots in one group, oldest first, and its row in the group's tables.

    Attributes:
        row: of the tables.
        retention: what the group keeps of a sequence.
        exact, pages: slots held; pages past the sealed blocks are reserved for seals due.
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
        self._num_published = 0  # full exact pages looked at so far, in sequence order
        self._num_encoded = 0  # blocks whose pages are written, shown or not
        self._num_attached = 0  # blocks that a prefix hit brought as pages
        # blocks below have had pages ahead that made room: they wait until they are due
        self._num_dropped = 0

    # ---- hold and give back --------------------------------------------------------------

    def hold(self, num_tokens: int, visible_blocks: int) -> bool:
        """Hold slots for `num_tokens` tokens and for the pages of `visible_blocks` blocks; False
        (and unchanged): not now."""
        num_pages = self.num_pages(self.retention.num_sealed(visible_blocks))
        return self._grow(self.num_exact(num_tokens), num_pages)

    def _grow(self, num_exact: int, num_pages: int) -> bool:
        """Hold at least so many exact pages and page slots; False (and unchanged): not now."""
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
        if grown:
            self._write_rows(before[0])
        return grown

    def _allocate(self, held: list[int], wanted: int, kind: SlotKind) -> bool:
        """Let `held` have at least `wanted` slots; False where the pool has no more."""
        while len(held) < wanted:
            slot = self._arena.slots.allocate(kind)
            if slot is None:
                return False
            held.append(slot)  # at once: the pool may move slots while allocating the next one
        return True

    def shrink(self, num_exact: int, num_pages: int) -> None:
        """Give back slots past the counts (a reservation that was not used)."""
        for held, wanted in ((self.exact, num_exact), (self.pages, num_pages)):
            while len(held) > wanted:
                self._arena.slots.release(held.pop())
        self._write_rows(num_exact)

    def cancel(self, num_tokens: int) -> None:
        """Give back what was reserved for tokens past `num_tokens`."""
        self.shrink(self.num_exact(num_tokens), self.num_pages(self._num_written))

    def slide(self, num_tokens: int) -> None:
        """Give back what no query from position `num_tokens` on sees."""
        first = self.retention.first_page(num_tokens)
        if first <= self.first_page:
            return
        num_exact, num_pages = self.exact_place(first), self.num_pages(self.block_of(first))
        gone = self.exact[:num_exact] + self.pages[:num_pages]
        del self.exact[:num_exact], self.pages[:num_pages]
        self.first_page = first
        for slot in gone:
            self._arena.slots.release(slot)
        self._write_rows(0)

    def free(self, chain: PrefixChain | None = None) -> None:
        """Release everything, the end of the sequence first and its landmarks last.

        So chains are evicted from their ends: what begins one is of use without what follows, and
        never the other way round. Exact pages that pages replaced were released when they were,
        oldest first; with the sequence's `chain` they get their place here.
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
        """Hold what `parent` holds of `num_tokens` tokens: full slots are shared, the partial exact
        page is copied. False: not now, and what is held is to be freed."""
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
        self._write_rows(0)
        return True

    def rename(self, names: dict[SlotKind, dict[int, int]]) -> None:
        """Follow slots that the pool moved, from their old names to their new ones."""
        self.exact[:] = [names[SlotKind.EXACT].get(s, s) for s in self.exact]
        self.pages[:] = [names[SlotKind.PAGE].get(s, s) for s in self.pages]
        self._write_rows(0)

    # ---- tables --------------------------------------------------------------------------

    def chunk_runs(self, num_tokens: int) -> tuple[TokenRun, ...]:
        """Where `num_tokens` tokens are, in the order in which a chunk's keys are laid out: by
        position where a window cuts them, else pages first."""
        by_position = self.retention.window is not None
        return self.runs(num_tokens) if by_position else self.runs_by_kind(num_tokens)

    def _write_rows(self, first_exact: int) -> None:
        self._exact_table.write(self.row, first_exact, self._exact_row(first_exact))
        self._page_table.write(self.row, 0, self._page_row())

    def _exact_row(self, first_exact: int) -> list[int]:
        """Units of the exact pages from the place `first_exact` on."""
        unit = self._arena.unit
        return [unit(slot, SlotKind.EXACT) for slot in self.exact[first_exact:]]

    def _page_row(self) -> list[int]:
        """Units of the sealed blocks, oldest first; a hole for a pinned one."""
        pages, pinned, first = iter(self.pages), set(self.pinned), self.first_block
        return [
            HOLE
            if block < first or block in pinned
            else self._arena.unit(next(pages), SlotKind.PAGE)
            for block in range(self.num_sealed)
        ]

    def check_rows(self, name: str) -> None:
        """Raise PoolError unless the tables' rows are what sequence `name` holds."""
        for table, held, kind in (
            (self._exact_table, self._exact_row(0), "EXACT"),
            (self._page_table, self._page_row(), "PAGE"),
        ):
            expected = held + [table.trash_unit] * (table.width - len(held))
            if table.host[self.row].tolist() != expected:
                raise PoolError(f"the {kind} table row of {name!r} is stale")

    # ---- prefix --------------------------------------------------------------------------

    def cached_exact(self, chain: PrefixChain, index: int) -> int | None:
        """Slot of the exact page with tokens `64 index ...`, if it is known."""
        return self._arena.slots.lookup((SlotKind.EXACT, chain[index]))

    def cached_page(self, chain: PrefixChain, block: int) -> int | None:
        """Slot of the page of `block`, if it is known."""
        last = self.last_index(block)
        if last >= len(chain):
            return None
        return self._arena.slots.lookup((SlotKind.PAGE, chain[last]))

    def attach(self, chain: PrefixChain, num_tokens: int, visible_blocks: int) -> None:
        """Take references on every slot of a prefix hit of `num_tokens` tokens, whose next query
        sees `visible_blocks` blocks as pages."""
        sealed = self.retention.num_sealed(visible_blocks)
        self.first_page = self.retention.first_page(num_tokens)
        for block in self.unpinned(range(self.first_block, sealed)):
            self._attach_slot(self.pages, self.cached_page(chain, block))
        for index in range(self.first_page, num_tokens // EXACT_PAGE_TOKENS):
            if not self.is_hidden(index, sealed):
                self._attach_slot(self.exact, self.cached_exact(chain, index))
        self.num_sealed = self._num_attached = sealed
        self._num_published = num_tokens // EXACT_PAGE_TOKENS
        self._write_rows(0)

    def _attach_slot(self, held: list[int], slot: int | None) -> None:
        assert slot is not None, "the hit was checked"
        self._arena.slots.acquire(slot)
        held.append(slot)

    def publish_exact(self, chain: PrefixChain, num_tokens: int) -> None:
        """Let full exact pages be found by their prefix.

        Those that a page replaced or that left the window are gone where token ids came late. A
        fork's may have been published by another.
        """
        full = min(num_tokens // EXACT_PAGE_TOKENS, len(chain))
        for index in range(max(self._num_published, self.first_page), full):
            if not self.is_sealed(index):
                self._publish(self.exact[self.exact_place(index)], SlotKind.EXACT, chain[index])
        self._num_published = max(self._num_published, full)

    def _publish(self, slot: int, kind: SlotKind, digest: bytes) -> None:
        if not self._arena.slots.is_published(slot):  # else by a fork that shares it
            self._arena.slots.publish(slot, (kind, digest))

    def forget(self, chain: PrefixChain | None) -> None:
        """Let nobody find what the sequence stored, what its pages replaced included."""
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
        """Blocks that need no sealing any more."""
        return max(self.num_sealed, self._num_encoded, self.first_block)

    def due(self, visible_blocks: int) -> list[int]:
        """Blocks that must be sealed before a query sees `visible_blocks` as pages."""
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
        """Give back pages of blocks that no query sees as pages yet; False where there are none.
        They are written again, the same, when they are due."""
        if self._num_encoded <= self.num_sealed:
            return False
        self._num_dropped, self._num_encoded = self._num_encoded, self.num_sealed
        self.shrink(len(self.exact), self.num_sealed_pages)
        return True

    def _block_slots(self, block: int) -> list[int]:
        """The eight exact pages of a block in the tail."""
        start = self.exact_place(self.first_index(block))
        return self.exact[start : start + PAGES_PER_BLOCK]

    def _page_slot(self, block: int) -> int:
        """The page that holds a block, or is reserved for it."""
        return self.pages[self.num_pages(block)]

    def block_units(self, block: int) -> tuple[list[int], int]:
        """Units of a tail block's eight exact pages and of the page reserved for it."""
        exact = [self._arena.unit(slot, SlotKind.EXACT) for slot in self._block_slots(block)]
        return exact, self._arena.unit(self._page_slot(block), SlotKind.PAGE)

    def note_encoded(self, block: int) -> bool:
        """The page of `block` is written; False where it was written before."""
        self._num_encoded = max(self._num_encoded, block + 1)
        return block >= self._num_dropped

    def publish_sealed(self, chain: PrefixChain | None, visible_blocks: int) -> None:
        """Show the pages of `visible_blocks` blocks in the table and free the exact pages they
        replace."""
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
        self._write_rows(0)
