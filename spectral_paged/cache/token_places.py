"""The places of a sequence's tokens in the slots that it holds in one layer group.

```
64 tokens      0 ... | landmarks | block 0 | block 1 | block 2 (pinned) | block 3 | tail
out of window  <-- first_page -->                                                            gone
sealed                                  [ page  ]                       [ page  ]         `pages`
exact                                             [ 8 exact pages     ]           [...]   `exact`
```
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS

PAGES_PER_BLOCK = BLOCK_TOKENS // EXACT_PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class TokenRun:
    """The tokens in entries `start` to `stop` of one table, blocks or exact pages."""

    sealed: bool
    start: int
    stop: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class TokenPlaces:
    """The places of a sequence's tokens among its exact pages and pages, both oldest first.

    `num_sealed` counts blocks in the page table: pages, and holes for blocks that are pinned or out
    of the window. `first_page` counts spans of 64 tokens that no query sees any more; where blocks
    are sealed it lies among the landmarks or at the start of a block.
    """

    num_landmark_pages: int
    pinned: tuple[int, ...] = ()  # blocks that are never sealed, ascending
    first_page: int = 0
    num_sealed: int = 0  # blocks shown in the page table

    def first_index(self, block: int) -> int:
        """The index of the first span of 64 tokens in `block`."""
        return self.num_landmark_pages + block * PAGES_PER_BLOCK

    def last_index(self, block: int) -> int:
        """The index of the last span of 64 tokens in `block`."""
        return self.num_landmark_pages + (block + 1) * PAGES_PER_BLOCK - 1

    def block_of(self, index: int) -> int:
        """The block that contains span `index` of 64 tokens; 0 for landmarks too."""
        return max(0, index - self.num_landmark_pages) // PAGES_PER_BLOCK

    @property
    def first_block(self) -> int:
        """The first block that has not left the window."""
        return self.block_of(self.first_page)

    def num_pages(self, num_blocks: int) -> int:
        """The number of pages for the first `num_blocks` blocks, without pinned ones and those out
        of the window; also the index of block `num_blocks` in `pages`."""
        first = self.first_block
        if num_blocks <= first:
            return 0
        pinned = bisect_left(self.pinned, num_blocks) - bisect_left(self.pinned, first)
        return num_blocks - first - pinned

    @property
    def num_sealed_pages(self) -> int:
        return self.num_pages(self.num_sealed)

    def unpinned(self, blocks: range) -> list[int]:
        """The blocks in `blocks` that are not pinned."""
        return [block for block in blocks if block not in self.pinned]

    def is_sealed(self, index: int) -> bool:
        """True if span `index` of 64 tokens lies in a sealed block, in the window or not."""
        return self.is_hidden(index, self.num_sealed)

    def is_hidden(self, index: int, num_sealed: int) -> bool:
        """True if span `index` would lie in a sealed block with `num_sealed` blocks sealed."""
        block = self.block_of(index)
        return index >= self.num_landmark_pages and block < num_sealed and block not in self.pinned

    def exact_place(self, index: int) -> int:
        """The index in `exact` of the exact page with tokens `64 index ...`; for tokens of a sealed
        block, the index at which the block would begin."""
        block = self.block_of(index)
        if self.is_sealed(index):
            index = self.first_index(block)
        num_pages = self.num_pages(min(block, self.num_sealed))
        return index - self.first_page - num_pages * PAGES_PER_BLOCK

    def num_exact(self, num_tokens: int) -> int:
        """The number of exact pages for the tokens of `num_tokens` that are not sealed or gone."""
        return -(-(num_tokens - self.tail_start) // EXACT_PAGE_TOKENS)

    @property
    def tail_start(self) -> int:
        """The number of tokens before the tail that are not in exact pages.

        A tail token's place among the exact tokens is its position minus this number.
        """
        return self.first_page * EXACT_PAGE_TOKENS + self.num_sealed_pages * BLOCK_TOKENS

    def exact_before(self, position: int) -> int:
        """The number of tokens in exact pages whose positions are before `position`."""
        index, rest = divmod(position, EXACT_PAGE_TOKENS)
        if index < self.first_page:
            return 0
        rest = 0 if self.is_sealed(index) else rest
        return self.exact_place(index) * EXACT_PAGE_TOKENS + rest

    def runs(self, num_tokens: int) -> tuple[TokenRun, ...]:
        """The runs of `num_tokens` tokens by position; holes are left out."""
        found: list[TokenRun] = []
        at = self.first_page  # the next span of 64 tokens
        for block in range(self.first_block, self.num_sealed):
            if block in self.pinned:
                continue
            if at < self.first_index(block):
                found.append(self._exact_run(at, self.first_index(block) * EXACT_PAGE_TOKENS))
            if found and found[-1].sealed and found[-1].stop == block:
                start = found.pop().start
            else:
                start = block
            found.append(TokenRun(True, start, block + 1, (block + 1 - start) * BLOCK_TOKENS))
            at = self.first_index(block + 1)
        return (*found, self._exact_run(at, num_tokens))

    def _exact_run(self, index: int, end: int) -> TokenRun:
        start = self.exact_place(index)
        num_tokens = end - index * EXACT_PAGE_TOKENS
        return TokenRun(False, start, start - (-num_tokens // EXACT_PAGE_TOKENS), num_tokens)

    def runs_by_kind(self, num_tokens: int) -> tuple[TokenRun, ...]:
        """The runs of `num_tokens` tokens, pages first, which takes fewer reads."""
        sealed, exact = self.num_sealed_pages * BLOCK_TOKENS, num_tokens - self.tail_start
        pages = TokenRun(True, 0, self.num_sealed, sealed)
        tail = TokenRun(False, 0, -(-exact // EXACT_PAGE_TOKENS), exact)
        return (pages, tail) if sealed else (tail,)
