"""The attend part of decode from pages with explicit layouts (Gluon), for Hopper and Ampere.

A program reads the pages of one item for one KV head, in tiles of 128 tokens. Every byte of codes
is loaded from global memory into the register of the thread whose tensor-core operand it becomes.
Byte permutes turn it into INT8 levels there: no shared memory, no shuffle, no float.

```
scores   [128 tokens, 2 P] += codes of K [128 tokens, rank]    x digits of the query [rank, 2 P]
ranks    [rank, 2 P]       += codes of V [rank, 128 tokens]    x digits of weights   [128, 2 P]
```

Columns 2g and 2g + 1 are the high and low digit (base 128) of query g. One thread has both columns,
so that digits are joined in registers. All scores of a page are there before its first weight, so
that the page is one step of the softmax: its warps wait for each other twice, for the largest score
and for the weights, and what rank space has gathered is scaled once.

`gluon.operands` turns bytes into operands, `gluon.scores` products into weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from spectral_paged.kernels.decode.gluon.operands import (
    after_previous,
    level_words,
    levels,
    mma,
    score_layout,
    weight_layout,
    weight_steps,
)
from spectral_paged.kernels.decode.gluon.scores import (
    by_warp,
    capped,
    digits_of,
    gain_codes,
    merged,
    octaves,
    products,
    tile_scores,
    warp_layout,
)
from spectral_paged.kernels.decode.gluon.tiles import load_k, load_query, load_v, store
from spectral_paged.kernels.decode.parts import (
    MAX_GROUP,
    Partials,
    Projected,
    ScoreOptions,
    adds_values,
    group_sizes,
)
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.configs import DecodeConfig, dependent_launch
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import band_tuples

WARPS = 4

# ---- one tile ----------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["num_seqs"])
def _attend_kernel(
    plane_ptr,
    short_ptr,
    bf16_ptr,
    half_ptr,
    table_ptr,
    item_seq_ptr,
    item_start_ptr,
    first_entry_ptr,
    item_end_ptr,
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
    t0,
    t1,
    t2,
    t3,
    t4,
    t5,
    t6,
    t7,
    HEADS: gl.constexpr,
    P: gl.constexpr,
    DIM: gl.constexpr,
    K_RANK: gl.constexpr,
    V_RANK: gl.constexpr,
    KA: gl.constexpr,
    KB: gl.constexpr,
    VA: gl.constexpr,
    VB: gl.constexpr,
    HEAD_BYTES: gl.constexpr,
    K_GAIN: gl.constexpr,
    V_GAIN: gl.constexpr,
    V_SCALE: gl.constexpr,
    V_MEAN: gl.constexpr,
    V_SLOT: gl.constexpr,
    SLOTS: gl.constexpr,
    PER_PAGE: gl.constexpr,
    VALUES: gl.constexpr,
    INDEX_AT: gl.constexpr,
    CAPPED: gl.constexpr,
    WINDOW: gl.constexpr,
    TILES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Attend to the pages of one item for one KV head.

    `PER_PAGE`: a part is a page, not an item. `VALUES`: `adds_values` of the layout.
    """
    after_previous(PDL)
    item, head = gl.program_id(0), gl.program_id(1)
    seq = gl.load(item_seq_ptr + item)
    if seq < num_seqs:
        MMA: gl.constexpr = mma()
        S: gl.constexpr = score_layout(128, P)
        GROUP: gl.constexpr = gl.SliceLayout(0, S)
        TOKENS: gl.constexpr = gl.SliceLayout(1, S)
        NA: gl.constexpr = VA[1]
        NB: gl.constexpr = VB[1] if VB[1] > 0 else VA[1]
        A: gl.constexpr = score_layout(NA, P)
        B: gl.constexpr = score_layout(NB, P)
        D: gl.constexpr = score_layout(DIM, P)
        UNIT: gl.constexpr = 16256.0
        PARTS: gl.constexpr = 4 // TILES
        K: gl.constexpr = (HEAD_BYTES, K_GAIN, V_GAIN, KA, KB)
        start = gl.load(item_start_ptr + item)
        first_entry = gl.load(first_entry_ptr + seq)
        end = gl.load(item_end_ptr + item)
        row = table_ptr + seq * table_width
        tables = (t0, t1, t2, t3, t4, t5, t6, t7)
        digits = gl.allocate_shared_memory(
            gl.int8, [TILES, 2 * P, 128], gl.SwizzledSharedLayout(16, 1, 8, order=[1, 0])
        )
        WARPS_FOUND: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
        tops = gl.allocate_shared_memory(gl.float32, [P, 4], WARPS_FOUND)
        sums = gl.allocate_shared_memory(gl.float32, [P, 4], WARPS_FOUND)
        group = gl.arange(0, P, layout=GROUP)
        token = gl.arange(0, 128, layout=TOKENS)
        visible = 0
        if WINDOW:
            visible = gl.load(visible_ptr + seq).to(gl.int32)
        comp_a = gl.arange(0, NA, layout=gl.SliceLayout(1, A))
        comp_b = gl.arange(0, NB, layout=gl.SliceLayout(1, B))
        dim = gl.arange(0, DIM, layout=gl.SliceLayout(1, D))
        top = gl.full([P], float("-inf"), gl.float32, layout=GROUP)
        total = gl.zeros([P], gl.float32, layout=GROUP)
        page_total = total
        ranks_a = gl.zeros([NA, P], gl.float32, layout=A)
        ranks_b = gl.zeros([NB, P], gl.float32, layout=B)
        values = gl.zeros([DIM, P], gl.float32, layout=D)

        position = gl.load(row + start)
        following = gl.load(row + gl.minimum(start + 1, end - 1))
        slot = (first_entry + start).to(gl.int64) * HEADS + head
        query = load_query(digits_ptr, affine_ptr, slot, 0, P, K_RANK, K)
        keys = load_k(plane_ptr, short_ptr, position, 0, head, K)
        for entry in range(start, end):
            here, position = position, following
            following = gl.load(row + gl.minimum(entry + 2, end - 1))
            slot = (first_entry + entry).to(gl.int64) * HEADS + head
            next_slot = (first_entry + gl.minimum(entry + 1, end - 1)).to(gl.int64) * HEADS + head
            record = gl.maximum(here, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
            for part in gl.static_range(PARTS):
                # scores of some tiles; the codes of the next one arrive while one is computed
                scores, gains = (), ()
                most = gl.full([128, P], float("-inf"), gl.float32, layout=S)
                for i in gl.static_range(TILES):
                    ka, kb, k_gain, v_gain = keys
                    da, db, unit, offset = query
                    if i + 1 < TILES:
                        query = load_query(
                            digits_ptr, affine_ptr, slot, part * TILES + i + 1, P, K_RANK, K
                        )
                        keys = load_k(plane_ptr, short_ptr, here, part * TILES + i + 1, head, K)
                    else:
                        codes = load_v(plane_ptr, here, part * TILES, head, HEAD_BYTES, VA, VB)
                    found = products(ka, kb, da, db, tables, KA, KB, P)
                    found = tile_scores(
                        found,
                        k_gain,
                        v_gain,
                        unit,
                        offset,
                        cap,
                        here >= 0,
                        K_GAIN >= 0,
                        SLOTS,
                        CAPPED,
                    )
                    if WINDOW:
                        place = first_position + entry * 512 + (part * TILES + i) * 128 + token
                        found = gl.where((place >= visible)[:, None], found, float("-inf"))
                    most = gl.maximum(most, found)
                    scores = scores + (found,)
                    gains = gains + (v_gain,)

                # the largest of all warps' tokens, the outlier tokens of these tiles among them
                tops.store(by_warp(most, True))
                peak = gl.max(tops.load(warp_layout(P)), axis=1)
                new_top = gl.maximum(top, gl.convert_layout(peak, GROUP))
                exact = ()
                for j in gl.static_range(SLOTS):
                    index = gl.load(short_ptr + record + INDEX_AT // 2 + j).to(gl.int32)
                    score = gl.load(slots_ptr + (slot * SLOTS + j) * P + group)
                    if CAPPED:
                        score = capped(score, cap)
                    counts = (here >= 0) & (index // (128 * TILES) == part)
                    if WINDOW:
                        counts = counts & (first_position + entry * 512 + index >= visible)
                    score = gl.where(counts, score, float("-inf"))
                    new_top = gl.maximum(new_top, score)
                    exact = exact + (score,)
                safe = gl.where(new_top == float("-inf"), 0.0, new_top)
                shrink = gl.exp2(top - safe)
                top = new_top

                # weights, times the gains of V, as digits in shared memory
                plain = gl.zeros([128, P], gl.float32, layout=S)
                for i in gl.static_range(TILES):
                    weights = gl.exp2(scores[i] - safe[None, :])
                    high, low = digits_of(weights * UNIT)
                    both = gl.reshape(gl.join(high, low), (128, 2 * P))
                    digits.index(i).store(gl.permute(both, (1, 0)))
                    if K_GAIN >= 0:
                        weights *= gl.exp2(-octaves(gain_codes(gains[i], TOKENS)))[:, None]
                    plain += weights
                sums.store(by_warp(plain, False))

                acc_a = gl.zeros([NA, 2 * P], gl.int32, layout=MMA)
                acc_b = gl.zeros([NB, 2 * P], gl.int32, layout=MMA)
                for i in gl.static_range(TILES):
                    va, va_high, vb, vb_high = codes
                    if i + 1 < TILES:
                        codes = load_v(
                            plane_ptr, here, part * TILES + i + 1, head, HEAD_BYTES, VA, VB
                        )
                    else:
                        query = load_query(
                            digits_ptr,
                            affine_ptr,
                            slot if part + 1 < PARTS else next_slot,
                            (part + 1) % PARTS * TILES,
                            P,
                            K_RANK,
                            K,
                        )
                        keys = load_k(
                            plane_ptr,
                            short_ptr,
                            here if part + 1 < PARTS else position,
                            (part + 1) % PARTS * TILES,
                            head,
                            K,
                        )
                    w = digits.index(i).load(weight_layout(2 * P))
                    first = levels(va, va_high, tables, VA[1], VA[2], MMA)
                    second = weight_steps(w, VA[2] < 4, MMA)
                    for j in gl.static_range(4):
                        acc_a = mma_v2(first[j], second[j], acc_a)
                    if VB[1] > 0:
                        first = levels(vb, vb_high, tables, VB[1], VB[2], MMA)
                        second = weight_steps(w, VB[2] < 4, MMA)
                        for j in gl.static_range(4):
                            acc_b = mma_v2(first[j], second[j], acc_b)

                scale_at = bf16_ptr + record + V_SCALE // 2
                scale = gl.load(scale_at + VA[0] + comp_a).to(gl.float32) * (1.0 / UNIT)
                scale = gl.where(here >= 0, scale, 0.0)
                less = gl.convert_layout(shrink, gl.SliceLayout(0, A))
                found = merged(acc_a, P, A).to(gl.float32)
                ranks_a = ranks_a * less[None, :] + found * scale[:, None]
                if VB[1] > 0:
                    scale = gl.load(scale_at + VB[0] + comp_b).to(gl.float32) * (1.0 / UNIT)
                    scale = gl.where(here >= 0, scale, 0.0)
                    less = gl.convert_layout(shrink, gl.SliceLayout(0, B))
                    found = merged(acc_b, P, B).to(gl.float32)
                    ranks_b = ranks_b * less[None, :] + found * scale[:, None]
                summed = gl.sum(sums.load(warp_layout(P)), axis=1)
                summed = gl.convert_layout(summed, GROUP)
                total = total * shrink + summed
                page_total = page_total * shrink + summed
                values *= gl.convert_layout(shrink, gl.SliceLayout(0, D))[None, :]
                for j in gl.static_range(SLOTS):
                    weight = gl.exp2(exact[j] - safe)
                    total += weight
                    value = gl.load(half_ptr + record + V_SLOT // 2 + j * DIM + dim)
                    value = gl.where(here >= 0, value.to(gl.float32), 0.0)
                    weight = gl.convert_layout(weight, gl.SliceLayout(0, D))
                    values += value[:, None] * weight[None, :]

            if VALUES and V_MEAN >= 0:
                mean = gl.load(half_ptr + record + V_MEAN // 2 + dim).to(gl.float32)
                mean = gl.where(here >= 0, mean, 0.0)
                weight = gl.convert_layout(page_total, gl.SliceLayout(0, D))
                values += mean[:, None] * weight[None, :]
            page_total = gl.zeros([P], gl.float32, layout=GROUP)
            if PER_PAGE:
                store(
                    slot,
                    ranks_a,
                    ranks_b,
                    values,
                    top,
                    total,
                    vectors_ptr,
                    sums_ptr,
                    P,
                    DIM,
                    V_RANK,
                    VA,
                    VB,
                    VALUES,
                )
                top = gl.full([P], float("-inf"), gl.float32, layout=GROUP)
                total = gl.zeros([P], gl.float32, layout=GROUP)
                ranks_a = gl.zeros([NA, P], gl.float32, layout=A)
                ranks_b = gl.zeros([NB, P], gl.float32, layout=B)
                values = gl.zeros([DIM, P], gl.float32, layout=D)
        if not PER_PAGE:
            store(
                item.to(gl.int64) * HEADS + head,
                ranks_a,
                ranks_b,
                values,
                top,
                total,
                vectors_ptr,
                sums_ptr,
                P,
                DIM,
                V_RANK,
                VA,
                VB,
                VALUES,
            )


# ---- the op ------------------------------------------------------------------------------

NO_BAND = (0, 0, 8, 0, 0, 0, 0)


def supports(layout: PageLayout, group: int) -> bool:
    """Return whether this kernel reads pages of `layout`; Triton's reads the others."""
    k, v = layout.k, layout.v
    return (
        layout.head_dim in (64, 128)
        and group <= MAX_GROUP
        and layout.levels == "gaussian"
        and (layout.num_slots == 0 or k.gain_offset >= 0)
        and (k.gain_offset >= 0) == (v.gain_offset >= 0)
        and len(k.bands) <= 2
        and len(v.bands) <= 2
        and all((b.bits, b.count) in {(8, 32), (4, 32), (4, 64), (2, 32), (2, 64)} for b in k.bands)
        and all(b.count in (64, 128) for b in v.bands)
    )


def tiles_at_once(width: int) -> int:
    """Return how many tiles of a page share one softmax step, for `width` padded queries a head.

    More tiles wait less often for other warps, and need registers for their scores.
    """
    return max(1, 16 // width)


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
    """`triton.attend.attend_pages` for the layouts of `supports`: the same arguments."""
    heads, dim = layout.num_kv_heads, layout.head_dim
    width = group_sizes(q, layout)[1]
    k, v = layout.k, layout.v
    partials = Partials.empty(plan, layout, width, q.device)
    bands = [*band_tuples(k), NO_BAND][:2] + [*band_tuples(v), NO_BAND][:2]
    _attend_kernel[(plan.num_items, heads)](
        plane.view(torch.int32),
        plane.view(torch.int16),
        plane.view(torch.bfloat16),
        plane.view(torch.float16),
        table,
        plan.item_seq,
        plan.item_start,
        plan.first_entry,
        plan.item_end,
        projected.digits.view(torch.int32),
        projected.affine,
        projected.slots,
        options.visible(plan.item_seq),
        partials.vectors,
        partials.sums,
        q.shape[0],
        table.stride(0),
        options.first_position,
        options.cap,
        *level_words(),
        HEADS=heads,
        P=width,
        DIM=dim,
        K_RANK=k.rank,
        V_RANK=v.rank,
        KA=bands[0],
        KB=bands[1],
        VA=bands[2],
        VB=bands[3],
        HEAD_BYTES=layout.head_bytes,
        K_GAIN=k.gain_offset,
        V_GAIN=v.gain_offset,
        V_SCALE=v.scale_offset,
        V_MEAN=v.mean_offset,
        V_SLOT=v.slot_offset,
        SLOTS=layout.num_slots,
        PER_PAGE=not v.shared_basis,
        VALUES=adds_values(layout),
        INDEX_AT=layout.index_offset,
        CAPPED=options.capped,
        WINDOW=options.window,
        TILES=tiles_at_once(width),
        num_warps=WARPS,
        maxnreg=config.attend_registers,
        **dependent_launch(q.device),
    )
    return partials
