"""The finish part of decode attention, which merges items, in Triton; see `decode.parts`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.decode.parts import (
    ExactPartials,
    Partials,
    TilePartials,
    group_sizes,
)
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.configs import dependent_launch
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import after_previous, padded, times_rows

COLUMNS, ITEMS = 64, 32  # a program merges so many columns of so many items at once
APPLY_COLUMNS = 32


@triton.jit
def _add_items(
    first_item_ptr,
    part_ptr,
    sums_ptr,
    seq,
    head,
    group,
    dim,
    top,
    total,
    acc,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Merge the items of one query of one sequence, `ITEMS` at once, into a running result.

    `dim` are columns of the items' vectors of `SIZE`; a column outside counts as zero.
    """
    first = tl.load(first_item_ptr + seq)
    num_items = tl.load(first_item_ptr + seq + 1) - first
    inside = (dim >= 0) & (dim < SIZE)
    for begin in range(0, num_items, ITEMS):
        item = begin + tl.arange(0, ITEMS)
        ok = item < num_items
        at = ((first + item).to(tl.int64) * HEADS + head) * P
        peak = tl.load(sums_ptr + at * 2 + group, mask=ok, other=float("-inf"))
        part = tl.load(sums_ptr + at * 2 + P + group, mask=ok, other=0.0)
        vector = part_ptr + (at + group)[:, None] * SIZE + dim[None, :]
        vector = tl.load(vector, mask=ok[:, None] & inside[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(peak, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp2(top - safe), tl.exp2(peak - safe)
        total = total * shrink + tl.sum(weight * part, axis=0)
        acc = acc * shrink + tl.sum(vector * weight[:, None], axis=0)
        top = new_top
    return top, total, acc


@triton.jit(do_not_specialize_on_alignment=["sinks_ptr"])  # weights may lie anywhere
def _reduce_kernel(
    first_item_ptr,
    part_ptr,
    sums_ptr,
    beside_first_ptr,
    beside_ptr,
    beside_sums_ptr,
    sinks_ptr,
    seats_ptr,
    tile_first_ptr,
    tile_ptr,
    tile_sums_ptr,
    out_ptr,
    lse_ptr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    BESIDE: tl.constexpr,
    BESIDE_P: tl.constexpr,
    BESIDE_SIZE: tl.constexpr,
    SINKS: tl.constexpr,
    SEATS: tl.constexpr,
    TILE_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITEMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge all items of one query of one sequence, for some columns of their vectors.

    The vectors of items `BESIDE` are the last columns of those of the other items. Tiles have
    `SEATS` seats each; 0 means that there are no tiles. A sink is what the merge begins with: one
    weight of 1 at its score, and no value.
    """
    after_previous(PDL)
    seq, query = tl.program_id(0), tl.program_id(1)
    head, group = query // GROUP, query % GROUP
    dim = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([COLUMNS], tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + query + tl.arange(0, 1)).to(tl.float32) * 1.4426950408889634
        total += 1.0
    top, total, acc = _add_items(
        first_item_ptr,
        part_ptr,
        sums_ptr,
        seq,
        head,
        group,
        dim,
        top,
        total,
        acc,
        HEADS,
        P,
        SIZE,
        ITEMS,
    )
    if SEATS > 0:
        seat = tl.load(seats_ptr + seq) - 1
        if seat >= 0:
            top, total, acc = _add_items(
                tile_first_ptr,
                tile_ptr,
                tile_sums_ptr,
                seat // SEATS,
                head,
                seat % SEATS * GROUP + group,
                dim,
                top,
                total,
                acc,
                HEADS,
                TILE_P,
                SIZE,
                ITEMS,
            )
    if BESIDE:
        top, total, acc = _add_items(
            beside_first_ptr,
            beside_ptr,
            beside_sums_ptr,
            seq,
            head,
            group,
            dim - (SIZE - BESIDE_SIZE),
            top,
            total,
            acc,
            HEADS,
            BESIDE_P,
            BESIDE_SIZE,
            ITEMS,
        )
    whole = tl.where(total == 0, 1.0, total)
    out = seq * (HEADS * GROUP) + query
    tl.store(out_ptr + out * SIZE + dim, acc / whole, mask=dim < SIZE)
    if tl.program_id(2) == 0:
        one = tl.arange(0, 1)
        tl.store(lse_ptr + out + one, (top + tl.log2(whole)) * 0.6931471805599453)


@triton.jit(do_not_specialize=["num_seqs"])
def _apply_kernel(
    mixed_ptr,
    basis_ptr,
    out_ptr,
    num_seqs,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply merged vectors in rank space by V's shared basis, and add their last D columns.

    A program takes one KV head.
    """
    after_previous(PDL)
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_seqs * GROUP
    query = (row // GROUP * HEADS + head) * GROUP + row % GROUP
    dim, comp = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK_PAD)
    ok = real[:, None] & (comp < RANK)[None, :]
    vector = mixed_ptr + query[:, None] * (RANK + DIM)
    mixed = tl.load(vector + comp[None, :], mask=ok, other=0.0)
    ok = (comp < RANK)[:, None] & (dim < DIM)[None, :]
    basis = tl.load(
        basis_ptr + (head * RANK + comp)[:, None] * DIM + dim[None, :], mask=ok, other=0.0
    )
    found = times_rows(mixed, basis.to(tl.float16))
    ok = real[:, None] & (dim < DIM)[None, :]
    found += tl.load(vector + RANK + dim[None, :], mask=ok, other=0.0)
    tl.store(out_ptr + query[:, None] * DIM + dim[None, :], found, mask=ok)


def merge_items(
    q: Tensor,
    partials: Partials,
    first_item: Tensor,
    *,
    beside: ExactPartials | None = None,
    tiles: TilePartials | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Merge the items of each sequence: `[N, Hq, n]` in `dtype` and lse fp32 `[N, Hq]`.

    n is the size of the vectors of `partials`. Those of `beside` may be shorter: they are the last
    columns. Those of `tiles` have the same size. Sinks `[Hq]`, if any, count in both results, as in
    `decode_attention`.
    """
    num_seqs, num_q_heads = q.shape[:2]
    heads, width, size = partials.vectors.shape[1:]
    out = torch.empty(num_seqs, num_q_heads, size, dtype=dtype, device=q.device)
    lse = torch.empty(num_seqs, num_q_heads, dtype=torch.float32, device=q.device)
    more = beside or ExactPartials(partials, first_item)
    shared = tiles or TilePartials(partials, first_item, first_item, 0)
    _reduce_kernel[(num_seqs, num_q_heads, triton.cdiv(size, COLUMNS))](
        first_item,
        partials.vectors,
        partials.sums,
        more.first_item,
        more.partials.vectors,
        more.partials.sums,
        lse if sinks is None else sinks,
        shared.seats,
        shared.first_item,
        shared.partials.vectors,
        shared.partials.sums,
        out,
        lse,
        HEADS=heads,
        GROUP=num_q_heads // heads,
        P=width,
        SIZE=size,
        BESIDE=beside is not None,
        BESIDE_P=more.partials.vectors.shape[2],
        BESIDE_SIZE=more.partials.vectors.shape[3],
        SINKS=sinks is not None,
        SEATS=shared.seats_per_tile,
        TILE_P=shared.partials.vectors.shape[2],
        COLUMNS=COLUMNS,
        ITEMS=ITEMS,
        num_warps=1,
        **dependent_launch(q.device),
    )
    return out, lse


def finish(
    q: Tensor,
    partials: Partials,
    *,
    layout: PageLayout,
    basis: Tensor | None,
    plan: DecodePlan,
    beside: ExactPartials | None = None,
    tiles: TilePartials | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Merge partial results by sequence: out `[N, Hq, D]` in `dtype`, lse fp32 `[N, Hq]`.

    Args:
        partials: one for each item; in rank space with a shared `basis`, which is applied here.
        beside: partial results over exact pages of the same sequences, not in rank space.
        tiles: partial results over pages that sequences share, in the form of `partials`.
        sinks: as in `merge_items`.
    """
    if basis is None:
        return merge_items(
            q, partials, plan.first_item, beside=beside, tiles=tiles, sinks=sinks, dtype=dtype
        )
    group = group_sizes(q, layout)[0]
    heads, dim, side = layout.num_kv_heads, layout.head_dim, layout.v
    # the first `rank` columns are in rank space; the basis does not multiply the D behind them
    mixed, lse = merge_items(q, partials, plan.first_item, beside=beside, tiles=tiles, sinks=sinks)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    rows = 64 if q.shape[0] * group > 16 else 16
    grid = (triton.cdiv(q.shape[0] * group, rows), heads, triton.cdiv(dim, APPLY_COLUMNS))
    _apply_kernel[grid](
        mixed,
        basis,
        out,
        q.shape[0],
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        RANK=side.rank,
        RANK_PAD=padded(side.rank),
        ROWS=rows,
        COLUMNS=APPLY_COLUMNS,
        num_warps=4,
        num_stages=1,
        **dependent_launch(q.device),
    )
    return out, lse
