"""How much of a new sequence the cache has already."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_paged.kernels.layout import EXACT_PAGE_TOKENS
from spectral_paged.layer_group import LayerGroup
from spectral_paged.page_format import PageFormat
from spectral_paged.prefix import PrefixChain


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
    positions with one view is tried with that view.

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
        run = min(_cached_run(group, chain, visible, last, pinned) for group in groups)
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
