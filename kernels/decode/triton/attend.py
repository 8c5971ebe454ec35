"""The attend part of decode from pages, in portable Triton; see `decode.parts`."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.decode.parts import (
    Partials,
    Projected,
    ScoreOptions,
    adds_values,
    group_sizes,
)
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.card import Card, halved, limits_of
from spectral_paged.kernels.launch.configs import DecodeConfig
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import band_tuples, capped, level_table, load_values, padded


@triton.jit
def _store(
    part,
    ranks,
    values,
    top,
    total,
    vectors_ptr,
    sums_ptr,
    comp,
    dim,
    group,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    P: tl.constexpr,
    VALUES: tl.constexpr,
):
    SIZE: tl.constexpr = RANK + DIM if VALUES else RANK
    used = (group < P)[None, :]
    to = vectors_ptr + (part * P + group)[None, :] * SIZE
    tl.store(to + comp[:, None], ranks, mask=(comp < RANK)[:, None] & used)
    if VALUES:
        tl.store(to + RANK + dim[:, None], values, mask=(dim < DIM)[:, None] & used)
    tl.store(sums_ptr + part * 2 * P + group, top, mask=group < P)
    tl.store(sums_ptr + (part * 2 + 1) * P + group, total, mask=group < P)


@triton.jit(do_not_specialize=["num_seqs"])
def _attend_kernel(
    plane_ptr,
    table_ptr,
    item_seq_ptr,
    item_start_ptr,
    first_entry_ptr,
    item_end_ptr,
    levels_ptr,
    digits_ptr,
    affine_ptr,
    slots_ptr,
    visible_ptr,
    vectors_ptr,
    sums_ptr,
    num_seqs,
    table_width,
    first_position,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    K_RANK: tl.constexpr,
    V_RANK: tl.constexpr,
    K_BANDS: tl.constexpr,
    V_BANDS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    K_GAIN: tl.constexpr,
    V_GAIN: tl.constexpr,
    V_SCALE: tl.constexpr,
    V_MEAN: tl.constexpr,
    V_SLOT: tl.constexpr,
    INDEX_AT: tl.constexpr,
    SLOTS: tl.constexpr,
    PER_PAGE: tl.constexpr,
    VALUES: tl.constexpr,
    DIM_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Attend to the pages of one item for one KV head, `TOKENS` tokens at a time.

    `PER_PAGE`: a part is a page, not an item. `VALUES`: `adds_values` of the layout.
    """
    item, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(item_seq_ptr + item)
    if seq < num_seqs:
        start = tl.load(item_start_ptr + item)
        first_entry = tl.load(first_entry_ptr + seq)
        end = tl.load(item_end_ptr + item)
        k_comp, v_comp = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
        dim = tl.arange(0, DIM_PAD)
        group = tl.arange(0, COLS)
        real = group < GROUP
        top = tl.full([COLS], float("-inf"), tl.float32)
        total = tl.zeros([COLS], tl.float32)
        ranks = tl.zeros([V_PAD, COLS], tl.float32)
        values = tl.zeros([DIM_PAD, COLS], tl.float32)
        visible = 0
        if WINDOW:
            visible = tl.load(visible_ptr + seq).to(tl.int32)
        for entry in range(start, end):
            position = tl.load(table_ptr + seq * table_width + entry)
            if position >= 0:
                record = plane_ptr + position.to(tl.int64) * 128 + head * HEAD_BYTES
                slot = (first_entry + entry).to(tl.int64) * HEADS + head
                v_scale = tl.load(
                    (record + V_SCALE).to(tl.pointer_type(tl.bfloat16)) + v_comp,
                    mask=v_comp < V_RANK,
                    other=0.0,
                ).to(tl.float32)
                page_sum = tl.zeros([COLS], tl.float32)
                for step in range(512 // TOKENS):
                    tile = step * TOKENS // 128
                    token = step * TOKENS % 128 + tl.arange(0, TOKENS)
                    codes = load_values(
                        record,
                        levels_ptr,
                        tile,
                        token[:, None],
                        k_comp[None, :],
                        K_BANDS,
                        False,
                        K_RANK,
                    ).to(tl.float16)
                    at = digits_ptr + (slot * 4 + tile) * 2 * P * K_RANK
                    at += (2 * group)[None, :] * K_RANK + k_comp[:, None]
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
                    if CAPPED:
                        scores = capped(scores, cap)
                    if WINDOW:
                        place = first_position + entry * 512 + tile * 128 + token
                        scores = tl.where((place >= visible)[:, None], scores, float("-inf"))
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
                        record,
                        levels_ptr,
                        tile,
                        token[None, :],
                        v_comp[:, None],
                        V_BANDS,
                        True,
                        V_RANK,
                    )
                    ranks = ranks * shrink[None, :]
                    ranks += tl.dot(codes.to(tl.float16), weights.to(tl.float16)) * v_scale[:, None]
                total += page_sum
                if VALUES and V_MEAN >= 0:
                    mean = tl.load(
                        (record + V_MEAN).to(tl.pointer_type(tl.float16)) + dim,
                        mask=dim < DIM,
                        other=0.0,
                    ).to(tl.float32)
                    values += mean[:, None] * page_sum[None, :]
                for j in tl.static_range(SLOTS):
                    exact = tl.load(
                        slots_ptr + (slot * SLOTS + j) * P + group, mask=real, other=0.0
                    )
                    value = tl.load(
                        (record + V_SLOT).to(tl.pointer_type(tl.float16)) + j * DIM + dim,
                        mask=dim < DIM,
                        other=0.0,
                    ).to(tl.float32)
                    if CAPPED:
                        exact = capped(exact, cap)
                    if WINDOW:
                        slot_token = tl.load((record + INDEX_AT).to(tl.pointer_type(tl.int16)) + j)
                        slot_token = first_position + entry * 512 + slot_token
                        exact = tl.where(slot_token >= visible, exact, float("-inf"))
                    new_top = tl.maximum(top, exact)
                    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                    shrink = tl.exp2(top - safe)
                    weight = tl.exp2(exact - safe)
                    total = total * shrink + weight
                    values = values * shrink[None, :] + value[:, None] * weight[None, :]
                    ranks = ranks * shrink[None, :]
                    top = new_top
                if PER_PAGE:
                    _store(
                        slot,
                        ranks,
                        values,
                        top,
                        total,
                        vectors_ptr,
                        sums_ptr,
                        v_comp,
                        dim,
                        group,
                        V_RANK,
                        DIM,
                        P,
                        VALUES,
                    )
                    top = tl.full([COLS], float("-inf"), tl.float32)
                    total = tl.zeros([COLS], tl.float32)
                    ranks = tl.zeros([V_PAD, COLS], tl.float32)
                    values = tl.zeros([DIM_PAD, COLS], tl.float32)
        if not PER_PAGE:
            _store(
                item.to(tl.int64) * HEADS + head,
                ranks,
                values,
                top,
                total,
                vectors_ptr,
                sums_ptr,
                v_comp,
                dim,
                group,
                V_RANK,
                DIM,
                P,
                VALUES,
            )


@cache
def _tokens(k_rank: int, v_rank: int, card: Card) -> int:
    """Tokens whose codes are taken at once: at most 16,384 codes of a side in registers, and those
    of both in half of the shared memory."""
    return halved(
        128,
        fits=lambda tokens: (
            tokens * max(k_rank, v_rank) <= 16384
            and tokens * (k_rank + v_rank) * card.operand_bytes <= card.shared_bytes * 2 // 3
        ),
    )[0]


def attend_pages(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    projected: Projected,
    *,
    layout: PageLayout,
    plan: DecodePlan,
    options: ScoreOptions,
    config: DecodeConfig,
) -> Partials:
    """The weighted codes of every part, in rank space, and their sums; see `Partials`."""
    heads, dim = layout.num_kv_heads, layout.head_dim
    group, width = group_sizes(q, layout)
    k, v = layout.k, layout.v
    partials = Partials.empty(plan, layout, width, q.device)
    _attend_kernel[(plan.num_items, heads)](
        plane,
        table,
        plan.item_seq,
        plan.item_start,
        plan.first_entry,
        plan.item_end,
        level_table(layout.levels, q.device),
        projected.digits,
        projected.affine,
        projected.slots,
        options.visible(plan.item_seq),
        partials.vectors,
        partials.sums,
        q.shape[0],
        table.stride(0),
        options.first_position,
        options.cap,
        HEADS=heads,
        GROUP=group,
        P=width,
        DIM=dim,
        K_RANK=k.rank,
        V_RANK=v.rank,
        K_BANDS=band_tuples(k),
        V_BANDS=band_tuples(v),
        HEAD_BYTES=layout.head_bytes,
        K_GAIN=k.gain_offset,
        V_GAIN=v.gain_offset,
        V_SCALE=v.scale_offset,
        V_MEAN=v.mean_offset,
        V_SLOT=v.slot_offset,
        INDEX_AT=layout.index_offset,
        SLOTS=layout.num_slots,
        PER_PAGE=not v.shared_basis,
        VALUES=adds_values(layout),
        DIM_PAD=padded(dim),
        K_PAD=padded(k.rank),
        V_PAD=padded(v.rank),
        COLS=padded(width),
        TOKENS=_tokens(padded(k.rank), padded(v.rank), limits_of(q.device)),
        CAPPED=options.capped,
        WINDOW=options.window,
        num_warps=2 if padded(v.rank) <= 128 else 4,
        num_stages=1,
    )
    return partials
