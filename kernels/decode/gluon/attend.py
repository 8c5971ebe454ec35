"""The attend part of decode from pages with explicit layouts (Gluon), for Hopper and Ampere.

A program reads the pages of one item for one KV head, 128 tokens at a time. Every byte of codes is
loaded from global memory into the register of the thread whose tensor-core operand it becomes. Byte
permutes turn it into INT8 levels there: no shared memory, no shuffle, no float.

```
scores   [128 tokens, 2 P] += codes of K [128 tokens, rank]    x digits of the query [rank, 2 P]
ranks    [rank, 2 P]       += codes of V [rank, 128 tokens]    x digits of weights   [128, 2 P]
```

Columns 2g and 2g + 1 are the high and low digit (base 128) of query g. One thread has both columns,
so that digits are joined in registers. `gluon.operands` turns bytes into operands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from spectral_paged.kernels.decode.gluon.operands import (
    after_previous,
    capped,
    digit_steps,
    level_words,
    levels,
    merged,
    mma,
    score_layout,
    weight_layout,
    weight_steps,
)
from spectral_paged.kernels.decode.gluon.tiles import (
    load_tile,
    store,
)
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
    bytes_ptr,
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
        NA: gl.constexpr = VA[1]
        NB: gl.constexpr = VB[1] if VB[1] > 0 else VA[1]
        A: gl.constexpr = score_layout(NA, P)
        B: gl.constexpr = score_layout(NB, P)
        D: gl.constexpr = score_layout(DIM, P)
        UNIT: gl.constexpr = 16256.0
        start = gl.load(item_start_ptr + item)
        first_entry = gl.load(first_entry_ptr + seq)
        end = gl.load(item_end_ptr + item)
        row = table_ptr + seq * table_width
        tables = (t0, t1, t2, t3, t4, t5, t6)
        smem = gl.allocate_shared_memory(
            gl.int8, [2 * P, 128], gl.SwizzledSharedLayout(16, 1, 8, order=[1, 0])
        )
        group = gl.arange(0, P, layout=gl.SliceLayout(0, S))
        token = gl.arange(0, 128, layout=gl.SliceLayout(1, S))
        visible = 0
        if WINDOW:
            visible = gl.load(visible_ptr + seq).to(gl.int32)
        comp_a = gl.arange(0, NA, layout=gl.SliceLayout(1, A))
        comp_b = gl.arange(0, NB, layout=gl.SliceLayout(1, B))
        dim = gl.arange(0, DIM, layout=gl.SliceLayout(1, D))
        top = gl.full([P], float("-inf"), gl.float32, layout=gl.SliceLayout(0, S))
        total = gl.zeros([P], gl.float32, layout=gl.SliceLayout(0, S))
        page_sum = gl.zeros([128, P], gl.float32, layout=S)
        ranks_a = gl.zeros([NA, P], gl.float32, layout=A)
        ranks_b = gl.zeros([NB, P], gl.float32, layout=B)
        values = gl.zeros([DIM, P], gl.float32, layout=D)

        position = gl.load(row + start)
        following = gl.load(row + gl.minimum(start + 1, end - 1))
        slot = (first_entry + start).to(gl.int64) * HEADS + head
        ahead = load_tile(
            plane_ptr,
            bytes_ptr,
            short_ptr,
            digits_ptr,
            affine_ptr,
            position,
            slot,
            0,
            head,
            P,
            K_RANK,
            HEAD_BYTES,
            K_GAIN,
            V_GAIN,
            KA,
            KB,
            VA,
            VB,
        )
        for step in range((end - start) * 4):
            ka, kb, da, db, va, va_high, vb, vb_high, k_gain, v_gain, unit, offset = ahead
            tile = step % 4
            entry = start + step // 4
            here = position
            slot = (first_entry + entry).to(gl.int64) * HEADS + head
            # the next tile's bytes arrive while this one is computed
            next_entry = gl.minimum(start + (step + 1) // 4, end - 1)
            position = gl.where(tile == 3, following, position)
            following = gl.load(row + gl.minimum(next_entry + 1, end - 1))
            ahead = load_tile(
                plane_ptr,
                bytes_ptr,
                short_ptr,
                digits_ptr,
                affine_ptr,
                position,
                (first_entry + next_entry).to(gl.int64) * HEADS + head,
                (step + 1) % 4,
                head,
                P,
                K_RANK,
                HEAD_BYTES,
                K_GAIN,
                V_GAIN,
                KA,
                KB,
                VA,
                VB,
            )

            acc = gl.zeros([128, 2 * P], gl.int32, layout=MMA)
            first = levels(ka, ka, tables, 128, KA[2], MMA)
            second = digit_steps(da, KA[2] < 4, MMA)
            for i in gl.static_range(len(second)):  # a half word has one step, not two
                acc = mma_v2(first[i], second[i], acc)
            if KB[1] > 0:
                first = levels(kb, kb, tables, 128, KB[2], MMA)
                second = digit_steps(db, KB[2] < 4, MMA)
                for i in gl.static_range(len(second)):
                    acc = mma_v2(first[i], second[i], acc)
            scores = merged(acc, P, S).to(gl.float32)
            if K_GAIN >= 0:
                gain = gl.exp2((k_gain.to(gl.float32) - 128.0) * 0.0625)
                scores = scores * gain[:, None]
            scores = scores * unit[None, :] + offset[None, :]
            if CAPPED:
                scores = capped(scores, cap)
            if SLOTS > 0:
                scores = gl.where((k_gain == 0)[:, None], float("-inf"), scores)
            if WINDOW:
                place = first_position + entry * 512 + tile * 128 + token
                scores = gl.where((place >= visible)[:, None], scores, float("-inf"))
            if V_GAIN >= 0:
                octaves = (v_gain.to(gl.float32) - 128.0) * 0.0625
                scores = scores + octaves[:, None]
            scores = gl.where(here >= 0, scores, float("-inf"))
            new_top = gl.maximum(top, gl.max(scores, axis=0))
            safe = gl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = gl.exp2(top - safe)
            top = new_top
            weights = gl.exp2(scores - safe[None, :])  # times the gains of V
            plain = weights
            if V_GAIN >= 0:
                plain = weights * gl.exp2(-octaves)[:, None]
            page_sum = page_sum * shrink[None, :] + plain
            total = total * shrink
            whole = (weights * UNIT + 0.5).to(gl.int32)
            digits = gl.join((whole >> 7).to(gl.int8), (whole & 127).to(gl.int8))
            smem.store(gl.permute(gl.reshape(digits, (128, 2 * P)), (1, 0)))
            w = smem.load(weight_layout(2 * P))

            second = weight_steps(w, VA[2] < 4, MMA)
            acc = gl.zeros([NA, 2 * P], gl.int32, layout=MMA)
            first = levels(va, va_high, tables, VA[1], VA[2], MMA)
            for i in gl.static_range(4):
                acc = mma_v2(first[i], second[i], acc)
            record = bf16_ptr + (gl.maximum(here, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2))
            scale = gl.load(record + V_SCALE // 2 + VA[0] + comp_a).to(gl.float32) * (1.0 / UNIT)
            scale = gl.where(here >= 0, scale, 0.0)
            less = gl.convert_layout(shrink, gl.SliceLayout(0, A))
            found = merged(acc, P, A).to(gl.float32)
            ranks_a = ranks_a * less[None, :] + found * scale[:, None]
            if VB[1] > 0:
                second = weight_steps(w, VB[2] < 4, MMA)
                acc = gl.zeros([NB, 2 * P], gl.int32, layout=MMA)
                first = levels(vb, vb_high, tables, VB[1], VB[2], MMA)
                for i in gl.static_range(4):
                    acc = mma_v2(first[i], second[i], acc)
                scale = gl.load(record + V_SCALE // 2 + VB[0] + comp_b).to(gl.float32) * (
                    1.0 / UNIT
                )
                scale = gl.where(here >= 0, scale, 0.0)
                less = gl.convert_layout(shrink, gl.SliceLayout(0, B))
                found = merged(acc, P, B).to(gl.float32)
                ranks_b = ranks_b * less[None, :] + found * scale[:, None]
            values = values * gl.convert_layout(shrink, gl.SliceLayout(0, D))[None, :]

            if tile == 3:
                summed = gl.sum(page_sum, axis=0)
                page_sum = gl.zeros([128, P], gl.float32, layout=S)
                total = total + summed
                halves = half_ptr + (
                    gl.maximum(here, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
                )
                if VALUES and V_MEAN >= 0:
                    mean = gl.load(halves + V_MEAN // 2 + dim).to(gl.float32)
                    mean = gl.where(here >= 0, mean, 0.0)
                    values += (
                        mean[:, None] * gl.convert_layout(summed, gl.SliceLayout(0, D))[None, :]
                    )
                for j in gl.static_range(SLOTS):
                    exact = gl.load(slots_ptr + (slot * SLOTS + j) * P + group)
                    if CAPPED:
                        exact = capped(exact, cap)
                    if WINDOW:
                        index = gl.maximum(here, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
                        slot_token = gl.load(short_ptr + index + INDEX_AT // 2 + j).to(gl.int32)
                        slot_token = first_position + entry * 512 + slot_token
                        exact = gl.where(slot_token >= visible, exact, float("-inf"))
                    exact = gl.where(here >= 0, exact, float("-inf"))
                    value = gl.load(halves + V_SLOT // 2 + j * DIM + dim).to(gl.float32)
                    value = gl.where(here >= 0, value, 0.0)
                    new_top = gl.maximum(top, exact)
                    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
                    shrink = gl.exp2(top - safe)
                    weight = gl.exp2(exact - safe)
                    top = new_top
                    total = total * shrink + weight
                    ranks_a = ranks_a * gl.convert_layout(shrink, gl.SliceLayout(0, A))[None, :]
                    ranks_b = ranks_b * gl.convert_layout(shrink, gl.SliceLayout(0, B))[None, :]
                    values = values * gl.convert_layout(shrink, gl.SliceLayout(0, D))[None, :]
                    values += (
                        value[:, None] * gl.convert_layout(weight, gl.SliceLayout(0, D))[None, :]
                    )
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
                    top = gl.full([P], float("-inf"), gl.float32, layout=gl.SliceLayout(0, S))
                    total = gl.zeros([P], gl.float32, layout=gl.SliceLayout(0, S))
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
        plane,
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
        num_warps=WARPS,
        maxnreg=config.attend_registers,
        **dependent_launch(q.device),
    )
    return partials
