"""What the layers of a group keep of a sequence: every token exactly, or old blocks as pages.

Both kinds may have a window, behind which nothing is kept.
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
    """What sequences hold in a layer: exact pages and pages."""

    num_exact: int
    num_pages: int

    def num_bytes(self, format: PageFormat, itemsize: int) -> int:
        """Bytes of a layer, with `itemsize`-byte elements of exact pages."""
        exact = self.num_exact * format.exact_page_bytes(itemsize)
        return exact + self.num_pages * format.page_bytes


@dataclass(frozen=True)
class Retention(ABC):
    """What a group keeps of each sequence.

    Args:
        visibility: which blocks queries see as pages where blocks are sealed.
        window: tokens that a query sees, its own among them; None: all before it.
    """

    visibility: Visibility
    window: int | None = None
    seals: ClassVar[bool]
    bulk: ClassVar[SlotKind]  # what a long sequence is held in for the most part

    @property
    def reach(self) -> int:
        """Tokens that a query sees, its own among them."""
        return NEVER if self.window is None else self.window

    @property
    def num_landmark_pages(self) -> int:
        return self.visibility.landmarks // EXACT_PAGE_TOKENS

    @abstractmethod
    def num_sealed(self, visible_blocks: int) -> int:
        """Blocks held as pages when queries see `visible_blocks` as pages."""

    @abstractmethod
    def first_page(self, num_tokens: int) -> int:
        """Spans of 64 tokens that no query from position `num_tokens` on sees."""

    @abstractmethod
    def at_peak(self, num_tokens: int, pinned: tuple[int, ...] = ()) -> Need:
        """The most that a sequence holds until it has `num_tokens`; blocks `pinned` (ascending)
        are exact pages from first to last.

        A step stores at most a segment in front of a window before what left it is given back:
        everything, where each step is a segment.
        """

    def while_generating(self, num_tokens: int, num_prompt_tokens: int = 0) -> Need:
        """What a sequence of `num_tokens` holds, all sealed that is due."""
        visible = self.visibility.visible_blocks(num_tokens, num_prompt_tokens)
        places = TokenPlaces(
            self.num_landmark_pages,
            first_page=self.first_page(num_tokens),
            num_sealed=self.num_sealed(visible),
        )
        return Need(places.num_exact(num_tokens), places.num_sealed_pages)

    def _span(self, num_tokens: int) -> int:
        """Most tokens of a sequence of `num_tokens` that are in front of the window's start."""
        return self.reach + (self.visibility.segment or num_tokens)


class ExactRetention(Retention):
    """Every token in an exact page."""

    seals = False
    bulk = SlotKind.EXACT

    def num_sealed(self, visible_blocks: int) -> int:
        return 0

    def first_page(self, num_tokens: int) -> int:
        return max(0, num_tokens + 1 - self.reach) // EXACT_PAGE_TOKENS

    def at_peak(self, num_tokens: int, pinned: tuple[int, ...] = ()) -> Need:
        ends = 2 * EXACT_PAGE_TOKENS - 3  # of the span, in pages that it has a part of
        in_span = (self._span(num_tokens) + ends) // EXACT_PAGE_TOKENS
        return Need(min(-(-num_tokens // EXACT_PAGE_TOKENS), in_span), 0)


class SealedRetention(Retention):
    """Blocks that queries see as pages in pages, all else in exact pages."""

    seals = True
    bulk = SlotKind.PAGE

    def num_sealed(self, visible_blocks: int) -> int:
        return visible_blocks

    def first_page(self, num_tokens: int) -> int:
        """Whole blocks past the landmarks, for a block is sealed as a whole."""
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
    """What is kept in layers with `window`: those up to `EXACT_WINDOW`, and `exempt` ones, stay
    exact pages."""
    exact = ExactRetention(Visibility.of(format), window)
    if exempt or not format.seals or exact.reach <= EXACT_WINDOW:
        return exact
    return SealedRetention(exact.visibility, window)
