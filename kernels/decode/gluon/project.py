"""The project part of decode from pages with their own basis, with explicit layouts (Gluon).

A program is one warp and takes 16 rows (frames x queries of a KV head) of a page at a time. Each of
the four threads that share a row takes a consecutive quarter of the dimensions, both of the query
and of the basis. The order of a sum is free, so operands come in wide loads straight from memory.
A page's scales and exact vectors, which the products do not need, arrive meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from spectral_paged.kernels.decode.gluon.operands import (
    after_previous,
    dims_layout,
    from_dims,
    half_integers,
)
from spectral_paged.kernels.decode.parts import LOG2_E, Projected, group_sizes, projection_constants
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.configs import DecodeConfig, dependent_launch
from spectral_paged.kernels.page.layout import PageLayout

CHUNK = 32  # components that one product makes at a time


@gluon.constexpr_function
def _rows_layout():
    """`[16, 32]`: a thread has eight consecutive components, one 8-byte store of digits."""
    regs = [[0, 1], [0, 2], [0, 4], [8, 0]]
    return gl.DistributedLinearLayout(
        regs, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [], [], [16, 32]
    )


@gluon.jit
def _in_order(acc, R: gl.constexpr):
    """The components of an accumulator `[16, 32]` in order; no data moves between threads.

    Column 8 n + 2 j + e of the accumulator is component 8 j + 2 n + e.
    """
    acc = gl.permute(gl.reshape(acc, (16, 4, 4, 2)), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(acc, (16, 32)), R, assert_trivial=True)


@gluon.jit
def _parts(x, MMA: gl.constexpr):
    """fp32 split into two fp16 operands, as exact as fp32 in a sum of products."""
    first = x.to(gl.float16)
    rest = (x - first.to(gl.float32)).to(gl.float16)
    return from_dims(first, 0, MMA), from_dims(rest, 0, MMA)


@gluon.jit(do_not_specialize=["num_seqs"])
def _project_kernel(
    q_ptr,
    plane_ptr,
    half_ptr,
    bf16_ptr,
    short_ptr,
    table_ptr,
    item_seq_ptr,
    item_start_ptr,
    first_entry_ptr,
    item_end_ptr,
    cos_ptr,
    sin_ptr,
    digits_ptr,
    affine_ptr,
    slots_ptr,
    num_seqs,
    table_width,
    first_position,
    scale,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    DIM: gl.constexpr,
    TURN: gl.constexpr,
    RANK: gl.constexpr,
    BASIS_AT: gl.constexpr,
    HEAD_BYTES: gl.constexpr,
    SCALE_AT: gl.constexpr,
    MEAN_AT: gl.constexpr,
    SLOT_AT: gl.constexpr,
    INDEX_AT: gl.constexpr,
    SLOTS: gl.constexpr,
    STEP: gl.constexpr,
    PDL: gl.constexpr,
):
    after_previous(PDL)
    item, head = gl.program_id(0), gl.program_id(1)
    seq = gl.load(item_seq_ptr + item)
    if seq < num_seqs:
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
        R: gl.constexpr = _rows_layout()
        HALF: gl.constexpr = DIM // 2
        A: gl.constexpr = dims_layout(16, HALF)
        B: gl.constexpr = dims_layout(32, HALF)
        E: gl.constexpr = dims_layout(8, HALF)
        PARTS: gl.constexpr = P // 4  # programs that share a page's frames
        begin = gl.load(item_start_ptr + item) + gl.program_id(2) // PARTS
        first_tile = gl.program_id(2) % PARTS * (16 // P)
        first_entry = gl.load(first_entry_ptr + seq)
        end = gl.load(item_end_ptr + item)
        row_table = table_ptr + seq * table_width

        a_row = gl.arange(0, 16, layout=gl.SliceLayout(1, A))
        a_place = gl.arange(0, HALF, layout=gl.SliceLayout(0, A))
        group = gl.minimum(a_row % P, GROUP - 1)
        q_at = q_ptr + ((seq * HEADS + head) * GROUP + group)[:, None] * DIM + a_place[None, :]
        low, high = gl.load(q_at), gl.load(q_at + HALF)

        b_column = gl.arange(0, 32, layout=gl.SliceLayout(1, B))
        b_comp = b_column // 2 % 4 * 8 + b_column // 8 * 2 + b_column % 2  # see `_in_order`
        b_place = gl.arange(0, HALF, layout=gl.SliceLayout(0, B))
        b_at = b_comp[:, None] * DIM + b_place[None, :]
        e_part = gl.arange(0, 8, layout=gl.SliceLayout(1, E))
        e_place = gl.arange(0, HALF, layout=gl.SliceLayout(0, E))
        e_used = (e_part < SLOTS) | ((e_part == SLOTS) & (MEAN_AT >= 0))
        e_some = e_used[:, None] & (e_place >= 0)[None, :]
        e_begin = gl.where(e_part < SLOTS, SLOT_AT // 2 + e_part * DIM, MEAN_AT // 2)
        e_at = e_begin[:, None] + e_place[None, :]

        m_row = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))
        m_tile, m_group = first_tile + m_row // P, m_row % P
        column = gl.arange(0, 8, layout=gl.SliceLayout(0, MMA))
        r_row = gl.arange(0, 16, layout=gl.SliceLayout(1, R))
        r_tile, r_group = first_tile + r_row // P, r_row % P
        comp = gl.arange(0, 32, layout=gl.SliceLayout(0, R))
        for entry in range(begin, end, STEP):
            position = gl.load(row_table + entry)
            record = gl.maximum(position, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
            # scales, outlier keys and the mean arrive while the query is turned
            scales = ()
            for i in gl.static_range(RANK // 32):
                scales = scales + (gl.load(bf16_ptr + record + SCALE_AT // 2 + i * 32 + comp),)
            if MEAN_AT >= 0 or SLOTS > 0:
                low_e = gl.load(half_ptr + record + e_at, mask=e_some, other=0.0)
                high_e = gl.load(half_ptr + record + e_at + HALF, mask=e_some, other=0.0)
            if SLOTS > 0:
                token = gl.load(
                    short_ptr + record + INDEX_AT // 2 + gl.minimum(column, SLOTS - 1)
                ).to(gl.int32)

            low_q, high_q = low.to(gl.float32), high.to(gl.float32)
            if TURN:
                tile = first_tile + a_row // P
                middle = first_position + entry * 512 + tile * 128 + 64
                angle = middle[:, None] * HALF + a_place[None, :]
                cos, sin = gl.load(cos_ptr + angle), gl.load(sin_ptr + angle)
                turned = low_q * cos + high_q * sin
                high_q = high_q * cos - low_q * sin
                low_q = turned
            low_a, low_b = _parts(low_q, MMA)
            high_a, high_b = _parts(high_q, MMA)

            slot = (first_entry + entry).to(gl.int64) * HEADS + head
            valid = position >= 0
            products = ()
            top = gl.full([16], 1e-30, gl.float32, layout=gl.SliceLayout(1, R))
            for i in gl.static_range(RANK // 32):
                basis = plane_ptr + record * 2 + BASIS_AT + i * 32 * DIM
                acc = gl.zeros([16, 32], gl.float32, layout=MMA)
                rows = from_dims(half_integers(gl.load(basis + b_at)), 1, MMA)
                acc = mma_v2(low_a, rows, acc)
                rows = from_dims(half_integers(gl.load(basis + b_at + HALF)), 1, MMA)
                acc = mma_v2(high_a, rows, acc)
                found = _in_order(acc, R) * scales[i].to(gl.float32)[None, :]
                top = gl.maximum(top, gl.max(gl.abs(found), axis=1))
                products = products + (found,)
            inverse = 16256.0 / top
            to = digits_ptr + ((slot * 4 + r_tile) * 2 * P + 2 * r_group)[:, None] * RANK
            for i in gl.static_range(RANK // 32):
                # adding 1.5 * 2 ** 23 rounds to an integer, which is in the low bits of the fp32
                sums = products[i] * inverse[:, None] + 12582912.0
                whole = sums.to(gl.int32, bitcast=True)
                digits = to + (i * 32 + comp)[None, :]
                gl.store(digits, (whole >> 7).to(gl.int8))
                gl.store(digits + RANK, (whole & 127).to(gl.int8))
            affine = affine_ptr + (slot * 4 + r_tile) * 2 * P + r_group
            gl.store(affine, top * (scale / 16256.0))

            offset = gl.zeros([16], gl.float32, layout=gl.SliceLayout(1, MMA))
            if MEAN_AT >= 0 or SLOTS > 0:
                low_e, high_e = from_dims(low_e, 1, MMA), from_dims(high_e, 1, MMA)
                exact = gl.zeros([16, 8], gl.float32, layout=MMA)
                exact = mma_v2(low_a, low_e, exact)
                exact = mma_v2(high_a, high_e, exact)
                exact = mma_v2(low_b, low_e, exact)
                exact = mma_v2(high_b, high_e, exact) * scale
                offset = gl.sum(gl.where((column == SLOTS)[None, :], exact, 0.0), axis=1)
                if SLOTS > 0:
                    slots_at = slots_ptr + (slot * (SLOTS * P) + m_group)[:, None]
                    hit = (column < SLOTS)[None, :] & (m_tile[:, None] == (token // 128)[None, :])
                    gl.store(slots_at + (column * P)[None, :], exact, mask=hit & valid)
            affine = affine_ptr + (slot * 4 + m_tile) * 2 * P + P + m_group
            gl.store(affine, offset)


def supports(layout: PageLayout, rotary_dim: int) -> bool:
    """Return whether this kernel projects for `layout`; Triton's projects for the others."""
    own = layout.k.bands
    return (
        layout.head_dim in (64, 128)
        and layout.k.rank % CHUNK == 0
        and not layout.k.shared_basis
        and len(own) == 1
        and own[0].basis_bits == 8
        and layout.num_slots <= 7
        and (layout.rope == "post" or rotary_dim == layout.head_dim)
    )


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
    basis: None,
    plan: DecodePlan,
    config: DecodeConfig,
) -> Projected:
    """`triton.project.project_queries` for the layouts of `supports`: the same arguments."""
    heads, width = layout.num_kv_heads, group_sizes(q, layout)[1]
    out = Projected.empty(plan.max_entries, layout, width, q.device)
    splits = config.splits
    _project_kernel[(plan.num_items, heads, splits * (width // 4))](
        q.contiguous(),
        plane,
        plane.view(torch.float16),
        plane.view(torch.bfloat16),
        plane.view(torch.int16),
        table,
        plan.item_seq,
        plan.item_start,
        plan.first_entry,
        plan.item_end,
        cos,
        sin,
        out.digits,
        out.affine,
        out.slots,
        q.shape[0],
        table.stride(0),
        first_position,
        scale * LOG2_E,
        **projection_constants(q, layout),
        BASIS_AT=layout.k.bands[0].basis_offset,
        STEP=splits,
        num_warps=1,
        maxnreg=config.project_registers,
        **dependent_launch(q.device),
    )
    return out
