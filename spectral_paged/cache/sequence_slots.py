"""The slots that one sequence holds in one layer group, and where its tokens lie in them.

```
64 tokens      0 ... | landmarks | block 0 | block 1 | block 2 (pinned) | block 3 | tail
out of window  <-- first_page -->                                                            gone
sealed                                  [ page  ]                       [ page  ]         `pages`
exact                                             [ 8 exact pages     ]           [...]   `exact`
```
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS

PAGES_PER_BLOCK = BLOCK_TOKENS // EXACT_PAGE_TOKENS


def first_seen_page(
    num_tokens: int, *, window: int | None, num_landmark_pages: int, seals: bool
) -> int:
    """Spans of 64 tokens that no query from position `num_tokens` on sees; whole blocks where
    blocks are sealed, for a block is sealed as a whole."""
    if window is None:
        return 0
    index = max(0, num_tokens + 1 - window) // EXACT_PAGE_TOKENS
    past = index - num_landmark_pages
    return index - past % PAGES_PER_BLOCK if seals and past > 0 else index


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens behind each other in one table: entries `start` to `stop`, blocks or exact pages."""

    sealed: bool
    start: int
    stop: int
    num_tokens: int


@dataclass(slots=True)
class GroupSlots:
    """One sequence's slots in one group, oldest first, and its row in the tables.

    `num_sealed` counts blocks that queries see as pages or, where pinned or out of the window, as
    holes. `first_page` counts spans of 64 tokens that no query sees any more; where blocks are
    sealed it stands among the landmarks or at the start of a block.
    """

    row: int
    num_landmark_pages: int
    pinned: tuple[int, ...] = ()  # blocks that are never sealed, ascending
    exact: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    first_page: int = 0
    num_published: int = 0  # full exact pages looked at so far, in sequence order
    num_sealed: int = 0  # blocks shown in the page table; later pages are reserved for seals due
    num_encoded: int = 0  # blocks whose pages are written, shown or not
    num_attached: int = 0  # blocks that a prefix hit brought as pages
    num_dropped: int = 0  # blocks below have had pages ahead that made room: they wait until due

    def first_index(self, block: int) -> int:
        """The first span of 64 tokens of `block`."""
        return self.num_landmark_pages + block * PAGES_PER_BLOCK

    def block_of(self, index: int) -> int:
        """The block with the span `index` of 64 tokens; 0 also for landmarks."""
        return max(0, index - self.num_landmark_pages) // PAGES_PER_BLOCK

    @property
    def first_block(self) -> int:
        """Blocks below have left the window."""
        return self.block_of(self.first_page)

    def num_pages(self, num_blocks: int) -> int:
        """Pages held for the first `num_blocks` blocks: those neither pinned nor out of the window
        (a block's own page stands at this place of `pages`)."""
        first = self.first_block
        if num_blocks <= first:
            return 0
        pinned = bisect_left(self.pinned, num_blocks) - bisect_left(self.pinned, first)
        return num_blocks - first - pinned

    @property
    def num_sealed_pages(self) -> int:
        return self.num_pages(self.num_sealed)

    @property
    def num_written(self) -> int:
        """Blocks that need no sealing any more."""
        return max(self.num_sealed, self.num_encoded, self.first_block)

    def is_sealed(self, index: int) -> bool:
        """True if a page stands, or stood, for the span `index` of 64 tokens."""
        block = self.block_of(index)
        return index >= self.num_landmark_pages and (
            block < self.num_sealed and block not in self.pinned
        )

    def exact_place(self, index: int) -> int:
        """Where the exact page with tokens `64 index ...` stands in `exact`; with those of a sealed
        block, where the block would begin."""
        block = self.block_of(index)
        if self.is_sealed(index):
            index = self.first_index(block)
        return (
            index
            - self.first_page
            - self.num_pages(min(block, self.num_sealed)) * (PAGES_PER_BLOCK)
        )

    def num_exact(self, num_tokens: int) -> int:
        """Exact pages that hold what is neither sealed nor gone of `num_tokens` tokens."""
        return -(-(num_tokens - self.tail_start) // EXACT_PAGE_TOKENS)

    @property
    def tail_start(self) -> int:
        """Tokens before the tail that are not in exact pages: a position less that is its place."""
        return self.first_page * EXACT_PAGE_TOKENS + self.num_sealed_pages * BLOCK_TOKENS

    def exact_before(self, position: int) -> int:
        """Exact tokens held of positions before `position`."""
        index, rest = divmod(position, EXACT_PAGE_TOKENS)
        if index < self.first_page:
            return 0
        rest = 0 if self.is_sealed(index) else rest
        return self.exact_place(index) * EXACT_PAGE_TOKENS + rest

    def runs(self, num_tokens: int) -> tuple[Run, ...]:
        """What is held of `num_tokens` tokens, by position; holes are left out."""
        found: list[Run] = []
        at = self.first_page  # spans of 64 tokens told so far
        for block in range(self.first_block, self.num_sealed):
            if block in self.pinned:
                continue
            if at < self.first_index(block):
                found.append(self._exact_run(at, self.first_index(block) * EXACT_PAGE_TOKENS))
            if found and found[-1].sealed and found[-1].stop == block:
                start = found.pop().start
            else:
                start = block
            found.append(Run(True, start, block + 1, (block + 1 - start) * BLOCK_TOKENS))
            at = self.first_index(block + 1)
        return (*found, self._exact_run(at, num_tokens))

    def _exact_run(self, index: int, end: int) -> Run:
        start = self.exact_place(index)
        num_tokens = end - index * EXACT_PAGE_TOKENS
        return Run(False, start, start - (-num_tokens // EXACT_PAGE_TOKENS), num_tokens)
