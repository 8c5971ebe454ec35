"""How much of a new sequence the cache has already."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.sequence_slots import PAGES_PER_BLOCK
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat


def longest_hit(
    format: PageFormat,
    groups: list[LayerGroup],
    chain: PrefixChain,
    num_prompt_tokens: int,
    pinned: tuple[int, ...],
) -> tuple[int, int]:
    """(tokens, blocks seen as pages) of the longest hit that leaves one token to compute.

    The first new query must find exactly what a cold run would show it: pages for the blocks
    that it sees as pages, and exact pages for everything else before it. So each span of
    positions with one view is tried with that view. Layers with a window need no more than what it
    shows.

    Args:
        chain: keys of the sequence's full exact pages, its last token left out.
        num_prompt_tokens: where generated tokens begin.
        pinned: blocks that stay exact.
    """
    limit = len(chain)
    best = (0, 0)
    start = 0
    while start <= limit * EXACT_PAGE_TOKENS:
        visible = format.visible_blocks(start, num_prompt_tokens)
        end = format.chunk_end(start, num_prompt_tokens)
        last = min(limit, (end - 1) // EXACT_PAGE_TOKENS)
        whole = [group for group in groups if group.window is None]
        sliding = [group for group in groups if group.window is not None]
        run = min((_cached_run(g, chain, visible, last, pinned) for g in whole), default=last)
        run = _seen_run(sliding, chain, visible, run, pinned)
        tokens = run * EXACT_PAGE_TOKENS
        if tokens >= start and tokens > best[0]:
            best = (tokens, visible)
        start = end
    return best


def prefix_chain(
    format: PageFormat,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    cache_salt: str,
    pinned: tuple[int, ...],
) -> PrefixChain:
    """The chain of a sequence, as far as a hit may reach: all but its last token.

    What queries see behind a pinned block differs, so pins separate chains as salts do.
    """
    root = repr((format.fingerprint, cache_salt, pinned))  # no salt can spell another's pins
    chain = PrefixChain(root, num_prompt_tokens, generated_differ=format.seals)
    chain.extend(token_ids, len(token_ids) - 1)
    return chain


def _seen_run(
    groups: list[LayerGroup], chain: PrefixChain, visible: int, run: int, pinned: tuple[int, ...]
) -> int:
    """The most exact pages up to `run` behind which all that a window shows is there."""
    found = -1
    while run and found != run:  # until no group wants less than another
        found = run
        for group in groups:
            while run and (missing := _missing(group, chain, visible, run, pinned)) is not None:
                run = missing
    return run


def _missing(
    group: LayerGroup, chain: PrefixChain, visible: int, run: int, pinned: tuple[int, ...]
) -> int | None:
    """None where the window behind `run` exact pages is there; else the last page that lacks, which
    every longer run lacks too, or 0 where every run lacks some."""
    first = group.first_page(run * EXACT_PAGE_TOKENS)
    sealed = group.blocks_sealed(visible)
    first_block = max(0, first - group.num_landmark_pages) // PAGES_PER_BLOCK
    blocks = (b for b in range(first_block, sealed) if b not in pinned)
    if any(group.cached_page(chain, b) is None for b in blocks):
        return 0
    for index in reversed(range(first, run)):
        if not group.is_hidden(index, sealed, pinned) and group.cached_exact(chain, index) is None:
            return index
    return None


def _cached_run(
    group: LayerGroup, chain: PrefixChain, visible: int, last: int, pinned: tuple[int, ...]
) -> int:
    """Exact pages (of 64 tokens) covered without a gap when `visible` blocks are pages."""
    sealed = group.blocks_sealed(visible)
    if any(group.cached_page(chain, b) is None for b in range(sealed) if b not in pinned):
        return 0
    for index in range(last):
        hidden = group.is_hidden(index, sealed, pinned)
        if not hidden and group.cached_exact(chain, index) is None:
            return index
    return last
