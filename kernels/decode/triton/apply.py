"""Application of V's page bases to partial results of decode from pages, in portable Triton."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.decode.parts import Partials, adds_values, group_sizes
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.card import Card, halved, limits_of
from spectral_paged.kernels.launch.configs import DecodeConfig
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import (
    band_tuples,
    level_table,
    load_rows,
    padded,
    times_rows,
)


@triton.jit(do_not_specialize=["num_seqs"])
def _apply_kernel(
    plane_ptr,
    table_ptr,
    item_seq_ptr,
    item_start_ptr,
    first_entry_ptr,
    item_end_ptr,
    levels_ptr,
    vectors_ptr,
    sums_ptr,
    out_ptr,
    out_sums_ptr,
    num_seqs,
    table_width,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    BANDS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    MEAN_AT: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Multiply one item's vectors in rank space by the bases of their pages, and merge them.

    A program takes `COLUMNS` dimensions.
    """
    item, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(item_seq_ptr + item)
    if seq < num_seqs:
        first_entry = tl.load(first_entry_ptr + seq)
        SIZE: tl.constexpr = RANK + DIM if VALUES else RANK
        group = tl.arange(0, ROWS)
        real = group < P
        dim = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        comp = tl.arange(0, RANK_PAD)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for entry in range(tl.load(item_start_ptr + item), tl.load(item_end_ptr + item)):
            position = tl.load(table_ptr + seq * table_width + entry)
            if position >= 0:
                record = plane_ptr + position.to(tl.int64) * 128 + head * HEAD_BYTES
                slot = (first_entry + entry).to(tl.int64) * HEADS + head
                sums = sums_ptr + slot * 2 * P + group
                peak = tl.load(sums, mask=real, other=float("-inf"))
                new_top = tl.maximum(top, peak)
                safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                shrink, weight = tl.exp2(top - safe), tl.exp2(peak - safe)
                own = tl.load(sums + P, mask=real, other=0.0) * weight
                top = new_top
                total = total * shrink + own
                vector = vectors_ptr + (slot * P + group)[:, None] * SIZE
                ok = real[:, None] & (comp < RANK)[None, :]
                part = tl.load(vector + comp[None, :], mask=ok, other=0.0)
                rows = load_rows(record, levels_ptr, comp[:, None], dim[None, :], BANDS, RANK, DIM)
                found = times_rows(part, rows.to(tl.float16))
                acc = acc * shrink[:, None] + found * weight[:, None]
                if VALUES:
                    ok = real[:, None] & (dim < DIM)[None, :]
                    value = tl.load(vector + RANK + dim[None, :], mask=ok, other=0.0)
                    acc += value * weight[:, None]
                elif MEAN_AT >= 0:
                    mean = (record + MEAN_AT).to(tl.pointer_type(tl.float16)) + dim
                    mean = tl.load(mean, mask=dim < DIM, other=0.0).to(tl.float32)
                    acc += mean[None, :] * own[:, None]
        out = item.to(tl.int64) * HEADS + head
        to = out_ptr + (out * P + group)[:, None] * DIM + dim[None, :]
        tl.store(to, acc, mask=real[:, None] & (dim < DIM)[None, :])
        once = real & (tl.program_id(2) == 0)
        tl.store(out_sums_ptr + out * 2 * P + group, top, mask=once)
        tl.store(out_sums_ptr + (out * 2 + 1) * P + group, total, mask=once)


@cache
def _columns(dim: int, rank: int, card: Card) -> int:
    """Dimensions that a program multiplies: at most 16,384 elements of a basis in registers, and in
    half of the shared memory."""
    return halved(
        dim,
        fits=lambda columns: (
            columns * rank <= 16384
            and columns * rank * card.operand_bytes <= card.shared_bytes // 2
        ),
    )[0]


def apply_bases(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    partials: Partials,
    *,
    layout: PageLayout,
    plan: DecodePlan,
    config: DecodeConfig,
) -> Partials:
    """Partial results by item, vectors fp32 `[items, H, P, D]`, of those by page in rank space."""
    heads, dim, side = layout.num_kv_heads, layout.head_dim, layout.v
    width = group_sizes(q, layout)[1]
    out = Partials.sized(plan.num_items, layout, width, dim, q.device)
    columns = _columns(padded(dim), padded(side.rank), limits_of(q.device))
    _apply_kernel[(plan.num_items, heads, padded(dim) // columns)](
        plane,
        table,
        plan.item_seq,
        plan.item_start,
        plan.first_entry,
        plan.item_end,
        level_table("gaussian", q.device),
        partials.vectors,
        partials.sums,
        out.vectors,
        out.sums,
        q.shape[0],
        table.stride(0),
        HEADS=heads,
        P=width,
        DIM=dim,
        RANK=side.rank,
        BANDS=band_tuples(side),
        HEAD_BYTES=layout.head_bytes,
        MEAN_AT=side.mean_offset,
        VALUES=adds_values(layout),
        COLUMNS=columns,
        RANK_PAD=padded(side.rank),
        ROWS=padded(width),
        num_warps=4,
        num_stages=1,
    )
    return out
