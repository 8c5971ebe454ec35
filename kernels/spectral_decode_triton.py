"""Decode attention straight from spectral pages, in portable Triton.

```
project   q turned back with every frame, times B and the page's scales -> two INT8 digits   per page
attend    digits x codes -> scores -> weights x codes, in rank space                         per item
finish    items of a sequence merged, times V's basis                                        per head
```

Scores and weights never leave the chip; K and V are never rebuilt. The query is an integer of two
digits of base 128 and the codes are integers, so products are exact, whatever unit makes them. V's
basis is applied once a sequence where it is shared, once a page where the page has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.decode_plan import DecodePlan
from spectral_paged.kernels.layout import PageLayout
from spectral_paged.kernels.triton_page import (
    band_tuples,
    check_layout,
    digit_order,
    level_table,
    load_rows,
    load_values,
    padded,
)

LOG2_E = math.log2(math.e)
TARGET_ITEMS = 256  # items a head, where there is work for so many
TILES = 4


@dataclass(frozen=True, slots=True)
class Projected:
    """Queries as pages meet them; S table entries, padded group P (a power of two, at least 4).

    digits: int8 `[S, H, 4 tiles, 2 P, rank]`, rows 2g and 2g + 1 the high and the low digit of
        query g; components in `digit_order`.
    affine: fp32 `[S, H, 4 tiles, 2, P]`, what a unit of the product is worth, and what the page's
        mean adds; both for scores in bits (base 2).
    slots: fp32 `[S, H, num_slots, P]`, the scores of the outlier tokens in bits.
    """

    digits: Tensor
    affine: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class Partials:
    """What items found: weighted codes (not yet times V's basis), values and sums.

    ranks: fp32 `[items, H, P, rank]`; values: fp32 `[items, H, P, D]`, means and outlier tokens;
    sums: fp32 `[items, H, 2, P]`, the largest score in bits and the sum of weights.
    """

    ranks: Tensor
    values: Tensor
    sums: Tensor


@triton.jit
def _project_kernel(
    q_ptr, plane_ptr, table_ptr, item_seq_ptr, item_start_ptr, first_entry_ptr, chunk_ptr,
    cos_ptr, sin_ptr, basis_ptr, levels_ptr, digits_ptr, affine_ptr, slots_ptr,
    num_seqs, table_width, first_position, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    TURN: tl.constexpr, SHARED: tl.constexpr, RANK: tl.constexpr, BANDS: tl.constexpr,
    HEAD_BYTES: tl.constexpr, SCALE_AT: tl.constexpr, MEAN_AT: tl.constexpr, SLOT_AT: tl.constexpr,
    INDEX_AT: tl.constexpr, SLOTS: tl.constexpr, DIM_PAD: tl.constexpr, RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(item_seq_ptr + item)
    if seq < num_seqs:
        start = tl.load(item_start_ptr + item)
        first_entry = tl.load(first_entry_ptr + seq)
        count = tl.load(first_entry_ptr + seq + 1) - first_entry
        end = tl.minimum(start + tl.load(chunk_ptr), count)
        row = tl.arange(0, ROWS)  # tile x group
        tile, group = row // P, row % P
        dim = tl.arange(0, DIM_PAD)
        comp = tl.arange(0, RANK_PAD)
        row_ok = (group < GROUP) & (tile < 4)
        ok = row_ok[:, None] & (dim < DIM)[None, :]
        q_row = q_ptr + ((seq * HEADS + head) * GROUP + group)[:, None] * DIM
        q = tl.load(q_row + dim[None, :], mask=ok, other=0.0).to(tl.float32)
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        turned_dim = dim < 2 * HALF
        if TURN:
            swapped = tl.load(q_row + partner[None, :], mask=ok & turned_dim[None, :], other=0.0)
            swapped = tl.where((dim < HALF)[None, :], swapped.to(tl.float32), -swapped.to(tl.float32))
        if SHARED:
            b_at = basis_ptr + (head * RANK + comp)[None, :] * DIM + dim[:, None]
            b_ok = (comp < RANK)[None, :] & (dim < DIM)[:, None]
            basis = tl.load(b_at, mask=b_ok, other=0.0).to(tl.float16)
        for entry in range(start, end):
            position = tl.load(table_ptr + seq * table_width + entry)
            if position >= 0:
                record = plane_ptr + position.to(tl.int64) * 128 + head * HEAD_BYTES
                if TURN:  # q R(m) for the middle m of each frame
                    middle = first_position + entry * 512 + tile * 128 + 64
                    angle = middle[:, None] * HALF + (dim % HALF)[None, :]
                    use = ok & turned_dim[None, :]
                    cos = tl.load(cos_ptr + angle, mask=use, other=1.0)
                    sin = tl.load(sin_ptr + angle, mask=use, other=0.0)
                    query = q * cos + tl.where(use, swapped, 0.0) * sin
                else:
                    query = q
                query = query * scale
                if not SHARED:
                    rows = load_rows(record, levels_ptr, comp[None, :], dim[:, None], BANDS, RANK, DIM)
                    basis = rows.to(tl.float16)
                peak = tl.maximum(tl.max(tl.abs(query), axis=1), 1e-30)
                unit = query / peak[:, None]
                upper = unit.to(tl.float16)
                lower = ((unit - upper.to(tl.float32)) * 2048.0).to(tl.float16)
                product = tl.dot(upper, basis) + tl.dot(lower, basis) * (1.0 / 2048.0)
                scale_k = tl.load(
                    (record + SCALE_AT).to(tl.pointer_type(tl.bfloat16)) + comp,
                    mask=comp < RANK, other=0.0,
                )  # fmt: skip
                product = product * scale_k.to(tl.float32)[None, :]
                top = tl.maximum(tl.max(tl.abs(product), axis=1), 1e-30)
                whole = product * (16256.0 / top)[:, None]
                whole = tl.where(whole < 0, whole - 0.5, whole + 0.5).to(tl.int32)
                high = (whole + 64) >> 7
                low = whole - (high << 7)
                slot = (first_entry + entry).to(tl.int64) * HEADS + head
                order = digit_order(comp, BANDS)
                at = digits_ptr + ((slot * 4 + tile) * 2 * P + 2 * group)[:, None] * RANK + order[None, :]
                put = (tile < 4)[:, None] & (comp < RANK)[None, :]
                tl.store(at, high.to(tl.int8), mask=put)
                tl.store(at + RANK, low.to(tl.int8), mask=put)
                offset = tl.zeros_like(top)
                if MEAN_AT >= 0:
                    mean = tl.load(
                        (record + MEAN_AT).to(tl.pointer_type(tl.float16)) + dim, mask=dim < DIM, other=0.0
                    ).to(tl.float32)
                    offset = tl.sum(query * mean[None, :], axis=1)
                to = affine_ptr + (slot * 4 + tile) * 2 * P + group
                tl.store(to, top * peak / 16256.0, mask=tile < 4)
                tl.store(to + P, offset, mask=tile < 4)
                for j in tl.static_range(SLOTS):
                    token = tl.load((record + INDEX_AT).to(tl.pointer_type(tl.int16)) + j)
                    key = tl.load(
                        (record + SLOT_AT).to(tl.pointer_type(tl.float16)) + j * DIM + dim,
                        mask=dim < DIM, other=0.0,
                    ).to(tl.float32)  # fmt: skip
                    exact = tl.sum(query * key[None, :], axis=1)
                    tl.store(slots_ptr + (slot * SLOTS + j) * P + group, exact, mask=tile == token // 128)


@triton.jit
def _attend_kernel(
    plane_ptr, table_ptr, item_seq_ptr, item_start_ptr, first_entry_ptr, chunk_ptr, levels_ptr,
    digits_ptr, affine_ptr, slots_ptr, ranks_ptr, values_ptr, sums_ptr, num_seqs, table_width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr,
    K_RANK: tl.constexpr, V_RANK: tl.constexpr, K_BANDS: tl.constexpr, V_BANDS: tl.constexpr,
    HEAD_BYTES: tl.constexpr, K_GAIN: tl.constexpr, V_GAIN: tl.constexpr, V_SCALE: tl.constexpr,
    V_MEAN: tl.constexpr, V_SLOT: tl.constexpr, INDEX_AT: tl.constexpr, SLOTS: tl.constexpr,
    DIM_PAD: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(item_seq_ptr + item)
    if seq < num_seqs:
        start = tl.load(item_start_ptr + item)
        first_entry = tl.load(first_entry_ptr + seq)
        count = tl.load(first_entry_ptr + seq + 1) - first_entry
        end = tl.minimum(start + tl.load(chunk_ptr), count)
        token = tl.arange(0, 128)
        k_comp, v_comp = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
        k_order = digit_order(k_comp, K_BANDS)
        dim = tl.arange(0, DIM_PAD)
        group = tl.arange(0, COLS)
        real = group < GROUP
        top = tl.full([COLS], float("-inf"), tl.float32)
        total = tl.zeros([COLS], tl.float32)
        ranks = tl.zeros([V_PAD, COLS], tl.float32)
        values = tl.zeros([DIM_PAD, COLS], tl.float32)
        for entry in range(start, end):
            position = tl.load(table_ptr + seq * table_width + entry)
            if position >= 0:
                record = plane_ptr + position.to(tl.int64) * 128 + head * HEAD_BYTES
                slot = (first_entry + entry).to(tl.int64) * HEADS + head
                v_scale = tl.load(
                    (record + V_SCALE).to(tl.pointer_type(tl.bfloat16)) + v_comp,
                    mask=v_comp < V_RANK, other=0.0,
                ).to(tl.float32)  # fmt: skip
                page_sum = tl.zeros([COLS], tl.float32)
                for tile in range(4):
                    codes = load_values(
                        record, levels_ptr, tile, token[:, None], k_comp[None, :], K_BANDS, False, K_RANK
                    ).to(tl.float16)
                    at = digits_ptr + (slot * 4 + tile) * 2 * P * K_RANK
                    at += (2 * group)[None, :] * K_RANK + k_order[:, None]
                    ok = (k_comp < K_RANK)[:, None] & (group < P)[None, :]
                    high = tl.load(at, mask=ok, other=0).to(tl.float16)
                    low = tl.load(at + K_RANK, mask=ok, other=0).to(tl.float16)
                    whole = tl.dot(codes, high) * 128.0 + tl.dot(codes, low)
                    affine = affine_ptr + (slot * 4 + tile) * 2 * P + group
                    unit = tl.load(affine, mask=real, other=0.0)
                    offset = tl.load(affine + P, mask=real, other=0.0)
                    if K_GAIN >= 0:
                        gain = tl.load(record + K_GAIN + tile * 128 + token).to(tl.float32)
                        whole = whole * tl.exp2((gain - 128.0) * 0.0625)[:, None]
                    scores = whole * unit[None, :] + offset[None, :]
                    for j in tl.static_range(SLOTS):
                        skipped = tl.load((record + INDEX_AT).to(tl.pointer_type(tl.int16)) + j)
                        hit = token == skipped - tile * 128
                        scores = tl.where(hit[:, None], float("-inf"), scores)
                    new_top = tl.maximum(top, tl.max(scores, axis=0))
                    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                    shrink = tl.exp2(top - safe)
                    weights = tl.exp2(scores - safe[None, :])
                    page_sum = page_sum * shrink + tl.sum(weights, axis=0)
                    total, values, top = total * shrink, values * shrink[None, :], new_top
                    if V_GAIN >= 0:
                        gain = tl.load(record + V_GAIN + tile * 128 + token).to(tl.float32)
                        weights = weights * tl.exp2((gain - 128.0) * 0.0625)[:, None]
                    codes = load_values(
                        record, levels_ptr, tile, token[None, :], v_comp[:, None], V_BANDS, True, V_RANK
                    )
                    ranks = ranks * shrink[None, :]
                    ranks += tl.dot(codes.to(tl.float16), weights.to(tl.float16)) * v_scale[:, None]
                total += page_sum
                if V_MEAN >= 0:
                    mean = tl.load(
                        (record + V_MEAN).to(tl.pointer_type(tl.float16)) + dim, mask=dim < DIM, other=0.0
                    ).to(tl.float32)
                    values += mean[:, None] * page_sum[None, :]
                for j in tl.static_range(SLOTS):
                    exact = tl.load(slots_ptr + (slot * SLOTS + j) * P + group, mask=real, other=0.0)
                    value = tl.load(
                        (record + V_SLOT).to(tl.pointer_type(tl.float16)) + j * DIM + dim,
                        mask=dim < DIM, other=0.0,
                    ).to(tl.float32)  # fmt: skip
                    new_top = tl.maximum(top, exact)
                    shrink = tl.exp2(top - new_top)
                    weight = tl.exp2(exact - new_top)
                    total = total * shrink + weight
                    values = values * shrink[None, :] + value[:, None] * weight[None, :]
                    ranks = ranks * shrink[None, :]
                    top = new_top
        out = item.to(tl.int64) * HEADS + head
        to = ranks_ptr + (out * P + group)[None, :] * V_RANK + v_comp[:, None]
        tl.store(to, ranks, mask=(v_comp < V_RANK)[:, None] & (group < P)[None, :])
        to = values_ptr + (out * P + group)[None, :] * DIM + dim[:, None]
        tl.store(to, values, mask=(dim < DIM)[:, None] & (group < P)[None, :])
        tl.store(sums_ptr + out * 2 * P + group, top, mask=group < P)
        tl.store(sums_ptr + (out * 2 + 1) * P + group, total, mask=group < P)


@triton.jit
def _finish_kernel(
    plane_ptr, table_ptr, item_start_ptr, first_item_ptr, basis_ptr, levels_ptr, ranks_ptr,
    values_ptr, sums_ptr, out_ptr, lse_ptr, table_width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr,
    SHARED: tl.constexpr, RANK: tl.constexpr, BANDS: tl.constexpr, HEAD_BYTES: tl.constexpr,
    DIM_PAD: tl.constexpr, RANK_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    seq, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(first_item_ptr + seq)
    num_items = tl.load(first_item_ptr + seq + 1) - first
    group = tl.arange(0, ROWS)
    dim, comp = tl.arange(0, DIM_PAD), tl.arange(0, RANK_PAD)
    real = group < GROUP
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(num_items):
        at = sums_ptr + ((first + i).to(tl.int64) * HEADS + head) * 2 * P + group
        top = tl.maximum(top, tl.load(at, mask=real, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    ranks = tl.zeros([ROWS, RANK_PAD], tl.float32)
    values = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for i in range(num_items):
        item = first + i
        at = item.to(tl.int64) * HEADS + head
        peak = tl.load(sums_ptr + at * 2 * P + group, mask=real, other=float("-inf"))
        weight = tl.exp2(peak - safe)
        total += weight * tl.load(sums_ptr + (at * 2 + 1) * P + group, mask=real, other=0.0)
        ok = real[:, None] & (comp < RANK)[None, :]
        part = tl.load(ranks_ptr + (at * P + group)[:, None] * RANK + comp[None, :], mask=ok, other=0.0)
        part = part * weight[:, None]
        ok = real[:, None] & (dim < DIM)[None, :]
        own = tl.load(values_ptr + (at * P + group)[:, None] * DIM + dim[None, :], mask=ok, other=0.0)
        values += own * weight[:, None]
        if SHARED:
            ranks += part
        else:
            position = tl.load(table_ptr + seq * table_width + tl.load(item_start_ptr + item))
            if position >= 0:
                record = plane_ptr + position.to(tl.int64) * 128 + head * HEAD_BYTES
                rows = load_rows(record, levels_ptr, comp[:, None], dim[None, :], BANDS, RANK, DIM)
                values += tl.dot(part, rows, input_precision="tf32x3")
    if SHARED:
        ok = (comp < RANK)[:, None] & (dim < DIM)[None, :]
        rows = tl.load(basis_ptr + (head * RANK + comp)[:, None] * DIM + dim[None, :], mask=ok, other=0.0)
        values += tl.dot(ranks, rows.to(tl.float32), input_precision="tf32x3")
    whole = tl.where(total == 0, 1.0, total)
    values = values / whole[:, None]
    out = (seq * HEADS + head) * GROUP + group
    ok = real[:, None] & (dim < DIM)[None, :]
    tl.store(out_ptr + out[:, None] * DIM + dim[None, :], values, mask=ok)
    tl.store(lse_ptr + out, (top + tl.log2(whole)) * 0.6931471805599453, mask=real)


def plan_pages(layout: PageLayout, num_pages: Tensor, max_entries: int) -> DecodePlan:
    """The items of a decode step over pages; an item a page where pages have their own basis."""
    chunk = 1 if layout.v.shared_basis is False else 1 << 30
    return DecodePlan.of(
        num_pages, max_entries=max_entries, target_items=TARGET_ITEMS, max_chunk=chunk
    )


def spectral_decode(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    num_pages: Tensor,
    *,
    layout: PageLayout,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    k_basis: Tensor | None = None,
    v_basis: Tensor | None = None,
    plan: DecodePlan | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.spectral_decode.spectral_decode` in Triton: the same arguments and results.

    Args:
        plan: `plan_pages` of this step, the same for all layers; made here where it is missing.

    Raises:
        ValueError: a layout that no kernel reads; the message says what to use instead.
    """
    check_layout(layout)
    if plan is None:
        plan = plan_pages(layout, num_pages, table.shape[0] * table.shape[1])
    projected = project_queries(
        q, plane, table, layout=layout, first_position=first_position, cos=cos, sin=sin,
        scale=scale, basis=k_basis, plan=plan,
    )  # fmt: skip
    partials = attend_pages(q, plane, table, projected, layout=layout, plan=plan)
    return finish(q, plane, table, partials, layout=layout, basis=v_basis, plan=plan)


def _sizes(q: Tensor, layout: PageLayout) -> tuple[int, int]:
    """Query heads of a KV head, and what they are padded to."""
    group = q.shape[1] // layout.num_kv_heads
    return group, padded(group, 4)


def project_queries(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    *,
    layout: PageLayout,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    basis: Tensor | None,
    plan: DecodePlan,
) -> Projected:
    """Queries in the rank space of every page and frame; see `Projected`."""
    heads, dim, side = layout.num_kv_heads, layout.head_dim, layout.k
    group, width = _sizes(q, layout)
    entries, device = plan.max_entries, q.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(entries, heads, *shape, dtype=dtype, device=device)

    out = Projected(
        empty(TILES, 2 * width, side.rank, dtype=torch.int8),
        empty(TILES, 2, width),
        empty(max(layout.num_slots, 1), width),
    )
    _project_kernel[(plan.num_items, heads)](
        q.contiguous(), plane, table, plan.item_seq, plan.item_start, plan.first_entry, plan.chunk,
        cos, sin, q if basis is None else basis, level_table("gaussian", device),
        out.digits, out.affine, out.slots,
        q.shape[0], table.stride(0), first_position, scale * LOG2_E,
        HEADS=heads, GROUP=group, P=width, DIM=dim, HALF=max(cos.shape[-1], 1),
        TURN=layout.rope == "frame", SHARED=side.shared_basis, RANK=side.rank,
        BANDS=band_tuples(side), HEAD_BYTES=layout.head_bytes, SCALE_AT=side.scale_offset,
        MEAN_AT=side.mean_offset, SLOT_AT=side.slot_offset, INDEX_AT=layout.index_offset,
        SLOTS=layout.num_slots, DIM_PAD=padded(dim), RANK_PAD=padded(side.rank),
        ROWS=padded(TILES * width), num_warps=4,
    )  # fmt: skip
    return out


def attend_pages(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    projected: Projected,
    *,
    layout: PageLayout,
    plan: DecodePlan,
) -> Partials:
    """Every item's scores, weights and sums in rank space; see `Partials`."""
    heads, dim = layout.num_kv_heads, layout.head_dim
    group, width = _sizes(q, layout)
    k, v = layout.k, layout.v
    items, device = plan.num_items, q.device
    partials = Partials(
        *(
            torch.empty(items, heads, *shape, dtype=torch.float32, device=device)
            for shape in ((width, v.rank), (width, dim), (2, width))
        )
    )
    _attend_kernel[(items, heads)](
        plane, table, plan.item_seq, plan.item_start, plan.first_entry, plan.chunk,
        level_table(layout.levels, device), projected.digits, projected.affine, projected.slots,
        partials.ranks, partials.values, partials.sums, q.shape[0], table.stride(0),
        HEADS=heads, GROUP=group, P=width, DIM=dim, K_RANK=k.rank, V_RANK=v.rank,
        K_BANDS=band_tuples(k), V_BANDS=band_tuples(v), HEAD_BYTES=layout.head_bytes,
        K_GAIN=k.gain_offset, V_GAIN=v.gain_offset, V_SCALE=v.scale_offset, V_MEAN=v.mean_offset,
        V_SLOT=v.slot_offset, INDEX_AT=layout.index_offset, SLOTS=layout.num_slots,
        DIM_PAD=padded(dim), K_PAD=padded(k.rank), V_PAD=padded(v.rank), COLS=padded(width),
        num_warps=4,
    )  # fmt: skip
    return partials


def finish(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    partials: Partials,
    *,
    layout: PageLayout,
    basis: Tensor | None,
    plan: DecodePlan,
) -> tuple[Tensor, Tensor]:
    """Items merged by sequence, times V's basis: out fp32 `[N, Hq, D]`, lse fp32 `[N, Hq]`."""
    group, width = _sizes(q, layout)
    heads, dim, side = layout.num_kv_heads, layout.head_dim, layout.v
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _finish_kernel[(q.shape[0], heads)](
        plane, table, plan.item_start, plan.first_item, q if basis is None else basis,
        level_table("gaussian", q.device), partials.ranks, partials.values, partials.sums,
        out, lse, table.stride(0),
        HEADS=heads, GROUP=group, P=width, DIM=dim, SHARED=side.shared_basis, RANK=side.rank,
        BANDS=band_tuples(side), HEAD_BYTES=layout.head_bytes, DIM_PAD=padded(dim),
        RANK_PAD=padded(side.rank), ROWS=padded(width), num_warps=4,
    )  # fmt: skip
    return out, lse
