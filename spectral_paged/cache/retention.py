"""Retention decides what layers keep of a sequence: every token exactly, or old blocks as pages.

Both kinds may have a window; tokens that have left it are not kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

from spectral_paged.cache.token_places import PAGES_PER_BLOCK, TokenPlaces
from spectral_paged.cache.visibility import NEVER, Visibility
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat
from spectral_paged.pool.slot_pool import SlotKind

EXACT_WINDOW = 1024  # tokens: a window up to here is a few pages, which sealing would not shrink


@dataclass(frozen=True, slots=True)
class Need:
    """The numbers of exact pages and of pages that a sequence holds in a layer."""

    num_exact: int
    num_pages: int

    def num_bytes(self, format: PageFormat, itemsize: int) -> int:
        """The bytes in one layer, with `itemsize`-byte elements in exact pages."""
        exact = self.num_exact * format.exact_page_bytes(itemsize)
        return exact + self.num_pages * format.page_bytes


@dataclass(frozen=True)
class Retention(ABC):
    """The rule by which a layer group keeps tokens of each sequence.

    Args:
        visibility: rule for the blocks that queries see as pages, where blocks are sealed.
        window: number of tokens that a query sees, its own included; None means all tokens.
    """

    visibility: Visibility
    window: int | None = None
    seals: ClassVar[bool]
    bulk: ClassVar[SlotKind]  # the kind of most slots of a long sequence

    @property
    def reach(self) -> int:
        """The number of tokens that a query sees, its own included; `NEVER` without a window."""
        return NEVER if self.window is None else self.window

    @property
    def num_landmark_pages(self) -> int:
        return self.visibility.landmarks // EXACT_PAGE_TOKENS

    @abstractmethod
    def num_sealed(self, visible_blocks: int) -> int:
        """The number of blocks held as pages when queries see `visible_blocks` as pages."""

    @abstractmethod
    def first_page(self, num_tokens: int) -> int:
        """The number of spans of 64 tokens that no query from position `num_tokens` on sees."""

    @abstractmethod
    def at_peak(self, num_tokens: int, pinned: tuple[int, ...] = ()) -> Need:
        """The most pages of each kind that a sequence holds until it has `num_tokens` tokens.

        Blocks in `pinned` (ascending) stay exact. A step stores up to a segment (without segments,
        the whole sequence) beyond the window before tokens that left the window are released.
        """

    def while_generating(self, num_tokens: int, num_prompt_tokens: int = 0) -> Need:
        """The pages that a sequence of `num_tokens` tokens holds when all due blocks are sealed."""
        visible = self.visibility.visible_blocks(num_tokens, num_prompt_tokens)
        places = TokenPlaces(
            self.num_landmark_pages,
            first_page=self.first_page(num_tokens),
            num_sealed=self.num_sealed(visible),
        )
        return Need(places.num_exact(num_tokens), places.num_sealed_pages)

    def _span(self, num_tokens: int) -> int:
        """The most tokens of a sequence of `num_tokens` from the start of its window on."""
        return self.reach + (self.visibility.segment or num_tokens)


class ExactRetention(Retention):
    """Retention of every token in an exact page."""

    seals = False
    bulk = SlotKind.EXACT

    def num_sealed(self, visible_blocks: int) -> int:
        return 0

    def first_page(self, num_tokens: int) -> int:
        return max(0, num_tokens + 1 - self.reach) // EXACT_PAGE_TOKENS

    def at_peak(self, num_tokens: int, pinned: tuple[int, ...] = ()) -> Need:
        ends = 2 * EXACT_PAGE_TOKENS - 3  # the span may cover only parts of its end pages
        in_span = (self._span(num_tokens) + ends) // EXACT_PAGE_TOKENS
        return Need(min(-(-num_tokens // EXACT_PAGE_TOKENS), in_span), 0)


class SealedRetention(Retention):
    """Retention in pages for blocks that queries see as pages, and exactly for other tokens."""

    seals = True
    bulk = SlotKind.PAGE

    def num_sealed(self, visible_blocks: int) -> int:
        return visible_blocks

    def first_page(self, num_tokens: int) -> int:
        """As in `Retention`, but past the landmarks only whole blocks count, because a block is
        sealed as a whole."""
        index = max(0, num_tokens + 1 - self.reach) // EXACT_PAGE_TOKENS
        past = index - self.num_landmark_pages
        return index - past % PAGES_PER_BLOCK if past > 0 else index

    def at_peak(self, num_tokens: int, pinned: tuple[int, ...] = ()) -> Need:
        held = len(pinned) * BLOCK_TOKENS
        exact = min(num_tokens, self.visibility.most_exact_tokens(num_tokens) + held)
        visible = self.visibility.visible_blocks(num_tokens, 0)
        pages = visible - bisect_left(pinned, visible)
        in_span = self._span(num_tokens) // BLOCK_TOKENS + 2
        return Need(-(-exact // EXACT_PAGE_TOKENS), min(pages, in_span))


def retention_of(format: PageFormat, window: int | None, *, exempt: bool = False) -> Retention:
    """The retention of a layer with `window`; `exempt` layers and windows up to `EXACT_WINDOW`
    keep every token exactly."""
    exact = ExactRetention(Visibility.of(format), window)
    if exempt or not format.seals or exact.reach <= EXACT_WINDOW:
        return exact
    return SealedRetention(exact.visibility, window)
