"""The capacity of a cache: bytes a group, the longest sequence, tokens and sequences that fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.retention import Retention
from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat
from spectral_paged.pool.slot_pool import SlotKind

Held = Sequence[SequenceSlots]
SLOT_TOKENS = {SlotKind.EXACT: EXACT_PAGE_TOKENS, SlotKind.PAGE: BLOCK_TOKENS}


@dataclass(frozen=True, slots=True)
class Share:
    """A layer group to which `divide` gives a part of the memory."""

    num_layers: int
    retention: Retention


def divide(
    format: PageFormat,
    shares: Sequence[Share],
    num_bytes: int,
    *,
    itemsize: int,
    max_num_seqs: int,
    max_model_len: int,
) -> list[int]:
    """The bytes of each group.

    Without windows, bytes are divided by the cost of a token, so that all groups run full at the
    same length. With windows the cost depends on the length, because a window has an end. Every
    group then first gets the bytes that one sequence of `max_model_len` needs (if there are so
    many), and the rest is divided so that `max_num_seqs` sequences of one length fill it.
    """

    slot_bytes = {
        SlotKind.EXACT: format.exact_page_bytes(itemsize),
        SlotKind.PAGE: format.page_bytes,
    }

    def cost(share: Share, num_tokens: int) -> int:
        need = share.retention.while_generating(num_tokens)
        return share.num_layers * need.num_bytes(format, itemsize)

    def most(share: Share) -> int:
        need = share.retention.at_peak(max_model_len)
        spare = 3 * max(slot_bytes.values())  # slabs are whole
        return share.num_layers * (need.num_bytes(format, itemsize) + spare)

    if all(share.retention.window is None for share in shares):
        first = [0] * len(shares)
        kinds = [share.retention.bulk for share in shares]
        parts = [
            share.num_layers * (slot_bytes[kind] / SLOT_TOKENS[kind])
            for share, kind in zip(shares, kinds, strict=True)
        ]
    else:
        first = [most(share) for share in shares]
        length = _largest(
            max_model_len,
            lambda n: max_num_seqs * sum(cost(s, n) for s in shares) <= num_bytes - sum(first),
        )
        parts = [float(cost(share, max(length, 1))) for share in shares]
        if sum(first) > num_bytes:
            first, parts = [0] * len(shares), [float(part) for part in first]
    rest = num_bytes - sum(first)
    return [
        bytes_ + int(rest * part / sum(parts)) for bytes_, part in zip(first, parts, strict=True)
    ]


def slabs_for(group: LayerGroup, num_tokens: int, pinned: tuple[int, ...] = ()) -> int:
    """The slabs of `group` that a single sequence of `num_tokens` needs at its peak."""
    need = group.retention.at_peak(num_tokens, pinned)
    return group.arena.slots.slabs_needed(need.num_exact, need.num_pages)


def fits_alone(groups: Sequence[LayerGroup], num_tokens: int, pinned: tuple[int, ...] = ()) -> bool:
    """True if a sequence of `num_tokens` fits when it has the pool to itself."""
    return all(slabs_for(g, num_tokens, pinned) <= g.arena.slots.num_slabs for g in groups)


def has_room(groups: Sequence[LayerGroup], growing: Sequence[tuple[Held, int]]) -> bool:
    """True if sequences fit at the peaks of their growth, beside all that is in use now.

    Args:
        growing: a sequence's slots in each group, and the tokens that it will have.
    """
    for place, group in enumerate(groups):
        slots = group.arena.slots
        exact, pages = slots.num_in_use[SlotKind.EXACT], slots.num_in_use[SlotKind.PAGE]
        for held, num_tokens in growing:
            need = group.retention.at_peak(num_tokens)
            exact += max(0, need.num_exact - len(held[place].exact))
            pages += max(0, need.num_pages - len(held[place].pages))
        if slots.slabs_needed(exact, pages) > slots.num_slabs:
            return False
    return True


def longest_sequence(groups: Sequence[LayerGroup], max_model_len: int) -> int:
    """The length of the longest single sequence that fits, at most `max_model_len` tokens."""
    return _largest(max_model_len, lambda tokens: fits_alone(groups, tokens))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; 0 always fits."""
    return bisect_right(range(1, most + 1), False, key=lambda number: not fits(number))


def capacity_tokens(groups: Sequence[LayerGroup]) -> int:
    """The number of tokens of long sequences that the arenas hold (sealed, tails not counted).

    Layers with windows count only if all layers have one.
    """

    def of(group: LayerGroup) -> int:
        slots, kind = group.arena.slots, group.retention.bulk
        return slots.num_slabs * slots.slots_per_slab[kind] * SLOT_TOKENS[kind]

    return min(of(group) for group in [g for g in groups if g.window is None] or groups)


def concurrency(groups: Sequence[LayerGroup], num_tokens: int, num_prompt_tokens: int = 0) -> int:
    """The number of sequences of `num_tokens` tokens that fit at once, with due blocks sealed.

    Prompts need a little more memory, because their last segment is exact until it ends.
    """

    def of(group: LayerGroup) -> int:
        slots = group.arena.slots
        need = group.retention.while_generating(num_tokens, num_prompt_tokens)
        return _largest(
            slots.num_slabs * max(slots.slots_per_slab.values()),
            lambda count: (
                slots.slabs_needed(count * need.num_exact, count * need.num_pages)
                <= slots.num_slabs
            ),
        )

    return min(of(group) for group in groups)
