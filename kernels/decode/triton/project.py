"""The project part of decode from pages, in portable Triton; see `decode.parts`."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.decode.parts import (
    LOG2_E,
    TILES,
    Projected,
    group_sizes,
    projection_constants,
)
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.card import Card, halved, limits_of
from spectral_paged.kernels.launch.configs import DecodeConfig
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import band_tuples, halves, level_table, load_rows, padded


@triton.jit
def _shared_rows(basis_ptr, head, comp, dims, there, RANK: tl.constexpr, DIM: tl.constexpr):
    """fp16 `[dims, comp]` of the basis that all pages share."""
    ok = (comp < RANK)[None, :] & there[:, None]
    at = basis_ptr + (head * RANK + comp)[None, :] * DIM + dims[:, None]
    return tl.load(at, mask=ok, other=0.0).to(tl.float16)


@triton.jit(do_not_specialize=["num_seqs"])
def _project_kernel(
    q_ptr,
    plane_ptr,
    table_ptr,
    item_seq_ptr,
    item_start_ptr,
    first_entry_ptr,
    item_end_ptr,
    cos_ptr,
    sin_ptr,
    basis_ptr,
    levels_ptr,
    digits_ptr,
    affine_ptr,
    slots_ptr,
    num_seqs,
    table_width,
    first_position,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    TURN: tl.constexpr,
    SHARED: tl.constexpr,
    RANK: tl.constexpr,
    BANDS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    SCALE_AT: tl.constexpr,
    MEAN_AT: tl.constexpr,
    SLOT_AT: tl.constexpr,
    INDEX_AT: tl.constexpr,
    SLOTS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    RANK_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    PAGES: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Project the queries of one item for one KV head; rows are `[PAGES, 4 tiles, P]`.

    Products add up over `PLACES` pairs of dimensions at a time, as many as registers hold.

    A page's exact vectors (mean, outlier tokens) are `EXTRA` columns beside the basis. A row keeps
    the products with its own page's columns.
    """
    item, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(item_seq_ptr + item)
    if seq < num_seqs:
        start = tl.load(item_start_ptr + item)
        first_entry = tl.load(first_entry_ptr + seq)
        end = tl.load(item_end_ptr + item)
        row = tl.arange(0, PAGES * 4 * P)
        page, tile, group = row // (4 * P), row // P % 4, row % P
        comp = tl.arange(0, RANK_PAD)
        column = tl.arange(0, PAGES * EXTRA)
        column_page, part = column // EXTRA, column % EXTRA
        q_row = q_ptr + ((seq * HEADS + head) * GROUP + group)[:, None] * DIM
        part_of = tl.arange(0, PLACES)
        if SHARED and PLACES == HALF_PAD:  # the whole basis stays in registers
            there = part_of < DIM // 2
            low_dim = tl.where(part_of < HALF, part_of, part_of + HALF)
            high_dim = tl.where(part_of < HALF, part_of + HALF, part_of + DIM // 2)
            b_low = _shared_rows(basis_ptr, head, comp, low_dim, there, RANK, DIM)
            b_high = _shared_rows(basis_ptr, head, comp, high_dim, there, RANK, DIM)
        row_table = table_ptr + seq * table_width
        for entry in range(start, end, PAGES):
            own = entry + page
            position = tl.load(row_table + own, mask=own < end, other=-1)
            valid = position >= 0
            record = plane_ptr + tl.maximum(position, 0).to(tl.int64) * 128 + head * HEAD_BYTES
            slot = (first_entry + own).to(tl.int64) * HEADS + head
            product = tl.zeros([PAGES * 4 * P, RANK_PAD], tl.float32)
            exact = tl.zeros([PAGES * 4 * P, PAGES * EXTRA], tl.float32)
            if MEAN_AT >= 0 or SLOTS > 0:
                held = entry + column_page
                at_page = tl.load(row_table + held, mask=held < end, other=-1)
                from_page = (
                    plane_ptr + tl.maximum(at_page, 0).to(tl.int64) * 128 + head * HEAD_BYTES
                )
                begin = tl.where(part < SLOTS, SLOT_AT + part * (2 * DIM), MEAN_AT)
                some = (at_page >= 0) & ((part < SLOTS) | ((part == SLOTS) & (MEAN_AT >= 0)))
                vector = (from_page + begin).to(tl.pointer_type(tl.float16))[None, :]
            for first in range(0, HALF_PAD, PLACES):
                # two halves of the dimensions, where a RoPE pair has one place; the rest pairs
                # arbitrarily
                place = first + part_of
                low_dim = tl.where(place < HALF, place, place + HALF)
                high_dim = tl.where(place < HALF, place + HALF, place + DIM // 2)
                there = place < DIM // 2
                ok = (group < GROUP)[:, None] & there[None, :]
                low_q = tl.load(q_row + low_dim[None, :], mask=ok, other=0.0).to(tl.float32)
                high_q = tl.load(q_row + high_dim[None, :], mask=ok, other=0.0).to(tl.float32)
                if TURN:  # q R(m) for the middle m of each frame
                    middle = first_position + own * 512 + tile * 128 + 64
                    angle = middle[:, None] * HALF + place[None, :]
                    use = valid[:, None] & (place < HALF)[None, :]
                    cos = tl.load(cos_ptr + angle, mask=use, other=1.0)
                    sin = tl.load(sin_ptr + angle, mask=use, other=0.0)
                    turned = low_q * cos + high_q * sin
                    high_q = high_q * cos - low_q * sin
                    low_q = turned
                # two fp16 parts make the dots below as exact as fp32
                low_a, low_b = halves(low_q)
                high_a, high_b = halves(high_q)
                if not SHARED:
                    alone = plane_ptr + tl.load(row_table + entry).to(tl.int64) * 128
                    alone += head * HEAD_BYTES
                    b_low = load_rows(
                        alone, levels_ptr, comp[None, :], low_dim[:, None], BANDS, RANK, DIM
                    ).to(tl.float16)
                    b_high = load_rows(
                        alone, levels_ptr, comp[None, :], high_dim[:, None], BANDS, RANK, DIM
                    ).to(tl.float16)
                elif PLACES < HALF_PAD:
                    b_low = _shared_rows(basis_ptr, head, comp, low_dim, there, RANK, DIM)
                    b_high = _shared_rows(basis_ptr, head, comp, high_dim, there, RANK, DIM)
                product = tl.dot(low_a, b_low, product)
                product = tl.dot(high_a, b_high, product)
                product = tl.dot(low_b, b_low, product)
                product = tl.dot(high_b, b_high, product)
                if MEAN_AT >= 0 or SLOTS > 0:
                    known = some[None, :] & there[:, None]
                    e_low = tl.load(vector + low_dim[:, None], mask=known, other=0.0)
                    e_high = tl.load(vector + high_dim[:, None], mask=known, other=0.0)
                    exact = tl.dot(low_a, e_low, exact)
                    exact = tl.dot(high_a, e_high, exact)
                    exact = tl.dot(low_b, e_low, exact)
                    exact = tl.dot(high_b, e_high, exact)
            scale_k = tl.load(
                (record + SCALE_AT).to(tl.pointer_type(tl.bfloat16))[:, None] + comp[None, :],
                mask=valid[:, None] & (comp < RANK)[None, :],
                other=0.0,
            )
            product = product * scale_k.to(tl.float32)
            top = tl.maximum(tl.max(tl.abs(product), axis=1), 1e-30)
            whole = tl.floor(product * (16256.0 / top)[:, None] + 0.5).to(tl.int32)
            high = (whole + 64) >> 7
            low = whole - (high << 7)
            at = (
                digits_ptr + ((slot * 4 + tile) * 2 * P + 2 * group)[:, None] * RANK + comp[None, :]
            )
            put = valid[:, None] & (comp < RANK)[None, :]
            tl.store(at, high.to(tl.int8), mask=put)
            tl.store(at + RANK, low.to(tl.int8), mask=put)

            offset = tl.zeros_like(top)
            if MEAN_AT >= 0 or SLOTS > 0:
                exact = exact * scale
                mine = page[:, None] == column_page[None, :]
                means = mine & (part == SLOTS)[None, :]
                offset = tl.sum(tl.where(means, exact, 0.0), axis=1)
                if SLOTS > 0:
                    token = tl.load(
                        (from_page + INDEX_AT).to(tl.pointer_type(tl.int16)) + part,
                        mask=(at_page >= 0) & (part < SLOTS),
                        other=-1,
                    ).to(tl.int32)
                    to = slots_ptr + (slot * SLOTS * P + group)[:, None] + (part * P)[None, :]
                    hit = mine & (part < SLOTS)[None, :] & (token >= 0)[None, :]
                    hit = hit & (tile[:, None] == (token // 128)[None, :])
                    tl.store(to, exact, mask=hit)
            to = affine_ptr + (slot * 4 + tile) * 2 * P + group
            tl.store(to, top * (scale / 16256.0), mask=valid)
            tl.store(to + P, offset, mask=valid)


@cache
def _places(half: int, rank: int, rows: int, card: Card) -> int:
    """Pairs of dimensions that a program multiplies at once.

    Registers hold two tiles `[places, rank]` of the basis of at most 8,192 elements each, and
    shared memory one of them and four of queries, `[rows, places]`.
    """
    return halved(
        half,
        fits=lambda places: (
            places * rank <= 8192
            and places * (rank + 4 * rows) * card.operand_bytes <= card.shared_bytes * 3 // 4
        ),
    )[0]


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
    config: DecodeConfig,
) -> Projected:
    """Project queries into the rank space of every page, turned back by frame; see `Projected`."""
    side, width = layout.k, group_sizes(q, layout)[1]
    out = Projected.empty(plan.max_entries, layout, width, q.device)
    pages = max(1, 32 // (TILES * width)) if side.shared_basis else 1
    half, rank, rows = padded(layout.head_dim // 2), padded(side.rank), pages * TILES * width
    _project_kernel[(plan.num_items, layout.num_kv_heads)](
        q.contiguous(),
        plane,
        table,
        plan.item_seq,
        plan.item_start,
        plan.first_entry,
        plan.item_end,
        cos,
        sin,
        q if basis is None else basis,
        level_table("gaussian", q.device),
        out.digits,
        out.affine,
        out.slots,
        q.shape[0],
        table.stride(0),
        first_position,
        scale * LOG2_E,
        **projection_constants(q, layout),
        HALF=cos.shape[-1],
        SHARED=side.shared_basis,
        BANDS=band_tuples(side),
        HALF_PAD=half,
        RANK_PAD=rank,
        PLACES=_places(half, rank, rows, limits_of(q.device)),
        PAGES=pages,
        EXTRA=padded(layout.num_slots + 1),
        num_warps=4,
        num_stages=1,
    )
    return out
