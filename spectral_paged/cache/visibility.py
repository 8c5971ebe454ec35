"""Visibility decides which blocks a query sees as pages."""

from __future__ import annotations

from dataclasses import dataclass

from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.pages import PageFormat

NEVER = 1 << 62  # a position that no sequence reaches


@dataclass(frozen=True, slots=True)
class Visibility:
    """The rule for what a query sees as pages, by its position and its prompt's length only.

    Args:
        landmarks: number of first tokens that are never in a page; a multiple of 64.
        hot: number of newest tokens that are not seen as pages; a multiple of 64, or `NEVER` if no
            block is ever seen as a page.
        segment: prompt tokens whose queries see each other exactly; a multiple of 512. 0 means the
            tokens of one step, however many.
    """

    landmarks: int
    hot: int
    segment: int

    @classmethod
    def of(cls, format: PageFormat) -> Visibility:
        """The visibility of a format's landmarks, hot tokens and segment."""
        hot = format.hot_tokens if format.seals else NEVER
        return cls(format.num_landmark_tokens, hot, format.prefill_segment)

    @property
    def by_step(self) -> bool:
        """True if what a token sees depends on the step that computes it."""
        return not self.segment and self.hot != NEVER

    def visible_blocks(self, position: int, num_prompt_tokens: int) -> int:
        """The number of leading blocks that the query at `position` sees as pages.

        Block b counts if and only if `s(t) >= landmarks + 512 (b + 1) + hot`, with s(t) = t for
        a generated token and the start of the token's segment for a prompt token. Where each step
        is a segment (`segment=0`), `position` must be the step's first one.
        """
        past = position - self.landmarks
        if position < num_prompt_tokens and self.segment:
            past = max(past, 0) // self.segment * self.segment
        return max(0, (past - self.hot) // BLOCK_TOKENS)

    def visible_from(self, block: int) -> int:
        """The position of the first generated token whose query sees `block` as a page."""
        return self.landmarks + BLOCK_TOKENS * (block + 1) + self.hot

    def chunk_end(self, start: int, num_prompt_tokens: int) -> int:
        """The first position after `start` whose query sees another number of pages than `start`'s.

        Queries of one step stay inside `[start, chunk_end)`, so that one step has one view
        (decision 0001).
        """
        if not self.segment:
            return NEVER
        blocks = self.visible_blocks(start, num_prompt_tokens)
        end = self.visible_from(blocks)  # while generating
        if start < num_prompt_tokens:
            num_segments = -(-(end - self.landmarks) // self.segment)  # until one sees more
            segment_end = self.landmarks + num_segments * self.segment
            if segment_end < num_prompt_tokens:
                return segment_end
            # the first generated token may see more pages than the last prompt token
            if self.visible_blocks(num_prompt_tokens, num_prompt_tokens) != blocks:
                return num_prompt_tokens
        return end

    def most_exact_tokens(self, num_tokens: int) -> int:
        """The most tokens that a sequence of `num_tokens` ever has outside pages."""
        if not self.segment:  # all of them may come in one step
            return num_tokens
        return min(num_tokens, self.landmarks + BLOCK_TOKENS + self.hot + self.segment)
