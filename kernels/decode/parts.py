"""The tensors that the parts of decode from pages hand on, the same in Triton and in Gluon.

```
project   per page: q turned back with every frame, times B and the scales -> two INT8 digits
attend    per item: digits x codes -> scores -> weights x codes, in rank space
finish    items of a sequence merged, those over its exact pages among them, times V's basis; where
          a page has its own, the other way round
```

Scores and weights never leave the chip; K and V are never rebuilt. The query is an integer of two
digits of base 128 and the codes are integers, so products are exact on any hardware. V's basis is
applied once a sequence where it is shared, and once a page where the page has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.math.scores import check_softcap
from spectral_paged.kernels.page.layout import PageLayout

LOG2_E = math.log2(math.e)
TILES = 4
MAX_GROUP = 16


@dataclass(frozen=True, slots=True)
class Projected:
    """Queries in the rank space of every page.

    S is the number of table entries. P is the padded size of a query group: a power of two, at
    least 4.

    digits: int8 `[S, H, 4 tiles, 2 P, rank]`, rows 2g and 2g + 1 the high and the low digit of
        query g.
    affine: fp32 `[S, H, 4 tiles, 2, P]`, the score of a product of 1, and the score that the page's
        mean adds; both in bits (base 2).
    slots: fp32 `[S, H, num_slots, P]`, the scores of the outlier tokens in bits.
    """

    digits: Tensor
    affine: Tensor
    slots: Tensor

    @classmethod
    def empty(cls, entries: int, layout: PageLayout, width: int, device: torch.device) -> Projected:
        """Uninitialized tensors for `entries` table entries and `width` padded queries a head."""

        def part(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(entries, layout.num_kv_heads, *shape, dtype=dtype, device=device)

        return cls(
            part(TILES, 2 * width, layout.k.rank, dtype=torch.int8),
            part(TILES, 2, width),
            part(max(layout.num_slots, 1), width),
        )


@dataclass(frozen=True, slots=True)
class Partials:
    """Partial results of decode attention: weighted codes, before V's basis, and sums of weights.

    A part is an item where the basis is shared, and a table entry where pages have their own. With
    page bases and no outlier tokens, the kernel that applies the basis adds V's means.

    vectors: fp32 `[parts, H, P, rank + D]`: in rank space, then the sum that means and outlier
        tokens add; `[parts, H, P, rank]` where that is left out.
    sums: fp32 `[parts, H, 2, P]`, the largest score in bits and the sum of weights.
    """

    vectors: Tensor
    sums: Tensor

    @classmethod
    def empty(
        cls, plan: DecodePlan, layout: PageLayout, width: int, device: torch.device
    ) -> Partials:
        """Uninitialized results of the attend part, for `width` padded queries a head."""
        shared = layout.v.shared_basis
        parts = plan.num_items if shared else plan.max_entries
        size = layout.v.rank + (layout.head_dim if adds_values(layout) else 0)
        return cls.sized(parts, layout, width, size, device)

    @classmethod
    def sized(
        cls, parts: int, layout: PageLayout, width: int, size: int, device: torch.device
    ) -> Partials:
        """Uninitialized results of `parts` parts of `width` padded queries a head."""
        return cls(
            *(
                torch.empty(parts, layout.num_kv_heads, *shape, dtype=torch.float32, device=device)
                for shape in ((width, size), (2, width))
            )
        )


@dataclass(frozen=True, slots=True)
class ExactPartials:
    """Partial results over exact pages of the same sequences, merged with those over pages.

    partials: vectors `[items, H, P, D]`, P not padded to 4.
    first_item: int32 `[N + 1]`, `DecodePlan.first_item` of these items.
    """

    partials: Partials
    first_item: Tensor


@dataclass(frozen=True, slots=True)
class TilePartials:
    """Partial results over shared pages, merged with those over each sequence's own.

    partials: those of tiles, with the vectors of the sequences' own partials.
    first_item: int32 `[T + 1]`, `DecodePlan.first_item` of these items.
    seats: int32 `[N]`, `SharedPages.seats`.
    seats_per_tile: M; query g of the sequence in place p of a tile is query p G + g of the tile.
    """

    partials: Partials
    first_item: Tensor
    seats: Tensor
    seats_per_tile: int


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """The cap and the mask of scores before their softmax; see `decode.reference.spectral_decode`.

    Raises:
        ValueError: the softcap is not positive.
    """

    first_position: int
    softcap: float | None = None
    first_visible: Tensor | None = None

    def __post_init__(self) -> None:
        check_softcap(self.softcap)

    @property
    def capped(self) -> bool:
        return self.softcap is not None

    @property
    def window(self) -> bool:
        return self.first_visible is not None

    @property
    def cap(self) -> float:
        """The softcap in bits; any positive number where scores are not capped."""
        return (self.softcap or 1.0) * LOG2_E

    def visible(self, other: Tensor) -> Tensor:
        """`first_visible`, or `other` in its place, a pointer that the kernel does not read."""
        return other if self.first_visible is None else self.first_visible


def adds_values(layout: PageLayout) -> bool:
    """Return whether partial vectors have room for the sum that means and outlier tokens add."""
    return layout.v.shared_basis or layout.num_slots > 0


def group_sizes(q: Tensor, layout: PageLayout) -> tuple[int, int]:
    """The size of a query group, and its padded size: a power of two, at least 4.

    Raises:
        ValueError: more than `MAX_GROUP` query heads share a KV head.
    """
    group = q.shape[1] // layout.num_kv_heads
    if group > MAX_GROUP:
        raise ValueError(
            f"{group} query heads share a KV head; GPU kernels take up to {MAX_GROUP}: use "
            "kv_format='exact'"
        )
    return group, max(4, 1 << (group - 1).bit_length())


def projection_constants(q: Tensor, layout: PageLayout) -> dict[str, Any]:
    """The constexpr arguments of all kernels that project queries; byte offsets are those of K."""
    group, width = group_sizes(q, layout)
    side = layout.k
    return {
        "HEADS": layout.num_kv_heads,
        "GROUP": group,
        "P": width,
        "DIM": layout.head_dim,
        "TURN": layout.rope == "frame",
        "RANK": side.rank,
        "HEAD_BYTES": layout.head_bytes,
        "SCALE_AT": side.scale_offset,
        "MEAN_AT": side.mean_offset,
        "SLOT_AT": side.slot_offset,
        "INDEX_AT": layout.index_offset,
        "SLOTS": layout.num_slots,
    }


def page_scratch_bytes(
    layout: PageLayout, num_q_heads: int, *, num_seqs: int, max_entries: int, num_items: int
) -> int:
    """The bytes that one layer's attention over pages takes for its parts, and the step for plans.

    Args:
        max_entries: most page table entries that all sequences read together.
        num_items: most items into which they are cut.
    """
    meta = torch.device("meta")
    q = torch.empty(num_seqs, num_q_heads, layout.head_dim, device=meta)
    width = group_sizes(q, layout)[1]
    projected = Projected.empty(max_entries, layout, width, meta)
    size = layout.v.rank + (layout.head_dim if adds_values(layout) else 0)
    parts = num_items if layout.v.shared_basis else max_entries
    partials = [Partials.sized(parts, layout, width, size, meta)]
    if not layout.v.shared_basis:
        partials.append(Partials.sized(num_items, layout, width, layout.head_dim, meta))
    held = [projected.digits, projected.affine, projected.slots]
    held += [x for part in partials for x in (part.vectors, part.sums)]
    merged = num_seqs * num_q_heads * (size + layout.head_dim + 1)  # fp32, in `finish`
    return sum(x.nbytes for x in held) + 4 * (merged + 2 * max_entries + 3 * num_items)
