"""What fits: how long a sequence may be, and how many tokens the arenas hold."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

from spectral_paged.block_pool import Kind
from spectral_paged.kernels.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.layer_group import LayerGroup
from spectral_paged.page_format import PageFormat


def peak_exact_tokens(format: PageFormat, num_tokens: int) -> int:
    """Most tokens a sequence of `num_tokens` ever holds in exact pages of a spectral group."""
    if not format.prefill_segment:  # all of them may come in one step
        return num_tokens
    window = format.num_landmark_tokens + BLOCK_TOKENS + format.hot_tokens + format.prefill_segment
    return min(num_tokens, window)


def slabs_for(
    format: PageFormat, group: LayerGroup, num_tokens: int, pinned: tuple[int, ...] = ()
) -> int:
    """Slabs that a sequence of `num_tokens` needs at its peak when it has the group to itself.

    Blocks `pinned` (ascending) are exact pages from first to last.
    """
    blocks = group.pool.blocks
    if not group.seals:
        return blocks.slabs_needed(-(-num_tokens // EXACT_PAGE_TOKENS), 0)
    held = len(pinned) * BLOCK_TOKENS
    exact = min(num_tokens, peak_exact_tokens(format, num_tokens) + held)
    visible = format.visible_blocks(num_tokens, 0)
    pages = visible - bisect_left(pinned, visible)
    return blocks.slabs_needed(-(-exact // EXACT_PAGE_TOKENS), pages)


def fits_alone(
    format: PageFormat, groups: list[LayerGroup], num_tokens: int, pinned: tuple[int, ...] = ()
) -> bool:
    """True if a sequence of `num_tokens` fits when it has the pool to itself."""
    return all(
        slabs_for(format, g, num_tokens, pinned) <= g.pool.blocks.num_slabs for g in groups
    )


def longest_sequence(format: PageFormat, groups: list[LayerGroup], max_model_len: int) -> int:
    """Longest single sequence that fits, at most `max_model_len` tokens."""
    return _largest(max_model_len, lambda tokens: fits_alone(format, groups, tokens))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; 0 always does."""
    return bisect_right(range(1, most + 1), False, key=lambda number: not fits(number))


def capacity_tokens(groups: list[LayerGroup]) -> int:
    """Tokens of long sequences that the arenas hold (sealed; tails not counted)."""
    per_group = []
    for group in groups:
        blocks = group.pool.blocks
        kind, tokens = (
            (Kind.PAGE, BLOCK_TOKENS) if group.seals else (Kind.EXACT, EXACT_PAGE_TOKENS)
        )
        per_group.append(blocks.num_slabs * blocks.slots_per_slab[kind] * tokens)
    return min(per_group)


def concurrency(
    format: PageFormat, groups: list[LayerGroup], num_tokens: int, num_prompt_tokens: int = 0
) -> int:
    """Sequences of `num_tokens` tokens that the arenas hold at once, all sealed that is due.

    A little more is needed while prompts come in: their last segment is exact until it ends.
    """

    def of(group: LayerGroup) -> int:
        blocks = group.pool.blocks
        pages = group.blocks_sealed(format.visible_blocks(num_tokens, num_prompt_tokens))
        exact = group.num_exact_pages(num_tokens, pages)
        return _largest(
            blocks.num_slabs * max(blocks.slots_per_slab.values()),
            lambda count: blocks.slabs_needed(count * exact, count * pages) <= blocks.num_slabs,
        )

    return min(of(group) for group in groups)
