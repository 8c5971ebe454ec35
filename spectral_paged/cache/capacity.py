"""What fits: how long a sequence may be, and how many tokens the arenas hold."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.sequence_slots import GroupSlots, first_seen_page
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat
from spectral_paged.pool.slot_pool import SlotKind


def peak_exact_tokens(format: PageFormat, num_tokens: int) -> int:
    """Most tokens a sequence of `num_tokens` ever holds in exact pages of a spectral group."""
    if not format.prefill_segment:  # all of them may come in one step
        return num_tokens
    window = format.num_landmark_tokens + BLOCK_TOKENS + format.hot_tokens + format.prefill_segment
    return min(num_tokens, window)


@dataclass(frozen=True, slots=True)
class Need:
    """What sequences hold in a layer: exact pages and pages."""

    num_exact: int
    num_pages: int

    @classmethod
    def at_peak(
        cls,
        format: PageFormat,
        num_tokens: int,
        *,
        seals: bool,
        window: int | None,
        pinned: tuple[int, ...] = (),
    ) -> Need:
        """The most that a sequence holds until it has `num_tokens`; blocks `pinned` (ascending)
        are exact pages from first to last.

        A step stores at most a segment in front of a window before what left it is given back:
        everything, where each step is a segment.
        """
        segment = format.prefill_segment or num_tokens
        span = None if window is None else window + segment
        if not seals:
            exact = -(-num_tokens // EXACT_PAGE_TOKENS)
            ends = 2 * EXACT_PAGE_TOKENS - 3  # of the span, in pages that it has a part of
            return cls(exact if span is None else min(exact, (span + ends) // EXACT_PAGE_TOKENS), 0)
        held = len(pinned) * BLOCK_TOKENS
        exact = min(num_tokens, peak_exact_tokens(format, num_tokens) + held)
        visible = format.visible_blocks(num_tokens, 0)
        pages = visible - bisect_left(pinned, visible)
        if span is not None:
            pages = min(pages, span // BLOCK_TOKENS + 2)
        return cls(-(-exact // EXACT_PAGE_TOKENS), pages)

    @classmethod
    def while_generating(
        cls,
        format: PageFormat,
        num_tokens: int,
        *,
        seals: bool,
        window: int | None,
        num_prompt_tokens: int = 0,
    ) -> Need:
        """What a sequence of `num_tokens` holds, all sealed that is due."""
        landmarks = format.num_landmark_tokens // EXACT_PAGE_TOKENS
        slots = GroupSlots(0, landmarks)
        slots.first_page = first_seen_page(
            num_tokens, window=window, num_landmark_pages=landmarks, seals=seals
        )
        if seals:
            slots.num_sealed = format.visible_blocks(num_tokens, num_prompt_tokens)
        return cls(slots.num_exact(num_tokens), slots.num_sealed_pages)

    def num_bytes(self, format: PageFormat, itemsize: int) -> int:
        """Bytes of a layer, with `itemsize`-byte elements of exact pages."""
        exact = self.num_exact * format.exact_page_bytes(itemsize)
        return exact + self.num_pages * format.page_bytes


@dataclass(frozen=True, slots=True)
class Share:
    """A group that wants a part of the memory."""

    num_layers: int
    seals: bool
    window: int | None


def divide(
    format: PageFormat,
    shares: Sequence[Share],
    num_bytes: int,
    *,
    itemsize: int,
    max_num_seqs: int,
    max_model_len: int,
) -> list[int]:
    """Bytes of each group.

    Without windows by what a token costs, so that all groups run full at the same length. What a
    sequence takes of a window has an end, so with windows it depends on the length: first, every
    group gets what one sequence of `max_model_len` needs (if there is so much), and the rest is
    divided so that `max_num_seqs` sequences of one length fill it.
    """

    def cost(share: Share, num_tokens: int) -> int:
        need = Need.while_generating(format, num_tokens, seals=share.seals, window=share.window)
        return share.num_layers * need.num_bytes(format, itemsize)

    if all(share.window is None for share in shares):
        first = [0] * len(shares)
        parts = [
            share.num_layers
            * (
                format.page_bytes / BLOCK_TOKENS
                if share.seals
                else format.exact_page_bytes(itemsize) / EXACT_PAGE_TOKENS
            )
            for share in shares
        ]
    else:
        spare = 3 * max(format.page_bytes, format.exact_page_bytes(itemsize))  # slabs are whole
        first = [
            share.num_layers
            * (
                Need.at_peak(
                    format, max_model_len, seals=share.seals, window=share.window
                ).num_bytes(format, itemsize)
                + spare
            )
            for share in shares
        ]
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


def slabs_for(
    format: PageFormat, group: LayerGroup, num_tokens: int, pinned: tuple[int, ...] = ()
) -> int:
    """Slabs that a sequence of `num_tokens` needs at its peak when it has the group to itself."""
    need = Need.at_peak(format, num_tokens, seals=group.seals, window=group.window, pinned=pinned)
    return group.arena.slots.slabs_needed(need.num_exact, need.num_pages)


def fits_alone(
    format: PageFormat, groups: list[LayerGroup], num_tokens: int, pinned: tuple[int, ...] = ()
) -> bool:
    """True if a sequence of `num_tokens` fits when it has the pool to itself."""
    return all(slabs_for(format, g, num_tokens, pinned) <= g.arena.slots.num_slabs for g in groups)


def longest_sequence(format: PageFormat, groups: list[LayerGroup], max_model_len: int) -> int:
    """Longest single sequence that fits, at most `max_model_len` tokens."""
    return _largest(max_model_len, lambda tokens: fits_alone(format, groups, tokens))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; 0 always does."""
    return bisect_right(range(1, most + 1), False, key=lambda number: not fits(number))


def capacity_tokens(groups: list[LayerGroup]) -> int:
    """Tokens of long sequences that the arenas hold (sealed; tails not counted); what layers with
    windows hold counts only where all layers have one."""
    per_group = []
    for group in [g for g in groups if g.window is None] or groups:
        slots = group.arena.slots
        kind, tokens = (
            (SlotKind.PAGE, BLOCK_TOKENS) if group.seals else (SlotKind.EXACT, EXACT_PAGE_TOKENS)
        )
        per_group.append(slots.num_slabs * slots.slots_per_slab[kind] * tokens)
    return min(per_group)


def concurrency(
    format: PageFormat, groups: list[LayerGroup], num_tokens: int, num_prompt_tokens: int = 0
) -> int:
    """Sequences of `num_tokens` tokens that the arenas hold at once, all sealed that is due.

    A little more is needed while prompts come in: their last segment is exact until it ends.
    """

    def of(group: LayerGroup) -> int:
        slots = group.arena.slots
        need = Need.while_generating(
            format,
            num_tokens,
            seals=group.seals,
            window=group.window,
            num_prompt_tokens=num_prompt_tokens,
        )
        return _largest(
            slots.num_slabs * max(slots.slots_per_slab.values()),
            lambda count: (
                slots.slabs_needed(count * need.num_exact, count * need.num_pages)
                <= slots.num_slabs
            ),
        )

    return min(of(group) for group in groups)
