"""A prefix hit is the part of a new sequence that the cache already stores."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.cache.visibility import Visibility
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat


def longest_hit(
    visibility: Visibility,
    slots: Sequence[SequenceSlots],
    chain: PrefixChain,
    num_prompt_tokens: int,
    *,
    max_tokens: int | None = None,
) -> tuple[int, int]:
    """The tokens of the longest hit that leaves one to compute, and its blocks seen as pages.

    The first new query must see exactly what it would see in a cold run: pages for the blocks that
    it sees as pages, and exact pages for every other token before it (decision 0002). So each span
    of positions with one view is tried with that view. Layers with a window need only the tokens
    inside it.

    Args:
        slots: the sequence's slots, one item a group, still empty.
        chain: keys of the sequence's full exact pages, its last token left out.
        num_prompt_tokens: position of the first generated token.
        max_tokens: most tokens of the hit; None: as many as are cached.
    """
    whole = [held for held in slots if held.retention.window is None]
    sliding = [held for held in slots if held.retention.window is not None]
    limit = len(chain)
    if max_tokens is not None:
        limit = min(limit, max_tokens // EXACT_PAGE_TOKENS)
    best = (0, 0)
    start = 0
    while start <= limit * EXACT_PAGE_TOKENS:
        visible = visibility.visible_blocks(start, num_prompt_tokens)
        end = visibility.chunk_end(start, num_prompt_tokens)
        last = min(limit, (end - 1) // EXACT_PAGE_TOKENS)
        run = min((_cached_run(held, chain, visible, last) for held in whole), default=last)
        run = _seen_run(sliding, chain, visible, run)
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

    Pinned blocks change the view of later queries, so pins separate chains as salts do.
    """
    root = repr((format.fingerprint, cache_salt, pinned))  # no salt can spell another's pins
    chain = PrefixChain(root, num_prompt_tokens, generated_differ=format.seals)
    chain.extend(token_ids, len(token_ids) - 1)
    return chain


def _seen_run(slots: list[SequenceSlots], chain: PrefixChain, visible: int, run: int) -> int:
    """The largest number of exact pages up to `run` whose windows are cached in every group."""
    found = -1
    while run and found != run:  # until every group agrees
        found = run
        for held in slots:
            while run and (missing := _missing(held, chain, visible, run)) is not None:
                run = missing
    return run


def _missing(slots: SequenceSlots, chain: PrefixChain, visible: int, run: int) -> int | None:
    """The last exact page that the window after `run` exact pages lacks; None if it lacks none.

    Every run between the result and `run` lacks that page too. The result is 0 if a block's page is
    missing, because every run lacks it.
    """
    first = slots.retention.first_page(run * EXACT_PAGE_TOKENS)
    sealed = slots.retention.num_sealed(visible)
    if _lacks_page(slots, chain, range(slots.block_of(first), sealed)):
        return 0
    for index in reversed(range(first, run)):
        if not slots.is_hidden(index, sealed) and slots.cached_exact(chain, index) is None:
            return index
    return None


def _cached_run(slots: SequenceSlots, chain: PrefixChain, visible: int, last: int) -> int:
    """The number of exact pages cached without a gap when `visible` blocks are pages."""
    sealed = slots.retention.num_sealed(visible)
    if _lacks_page(slots, chain, range(sealed)):
        return 0
    for index in range(last):
        if not slots.is_hidden(index, sealed) and slots.cached_exact(chain, index) is None:
            return index
    return last


def _lacks_page(slots: SequenceSlots, chain: PrefixChain, blocks: range) -> bool:
    return any(slots.cached_page(chain, block) is None for block in slots.unpinned(blocks))
