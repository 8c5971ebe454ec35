"""Queries in the rank space of pages, with explicit layouts (Gluon); see `project_queries`.

A warp takes the rows of one page (4 frames x 4 queries are the 16 rows of a tensor-core operand),
so nothing but the shared basis goes through shared memory and no warp waits for another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from spectral_paged.kernels.decode_parts import LOG2_E, Projected, group_sizes
from spectral_paged.kernels.decode_plan import DecodePlan
from spectral_paged.kernels.layout import PageLayout

WARPS = 4
CHUNK = 32  # components that one product makes at a time


@gluon.jit
def _parts(x):
    """fp32 as two fp16, as good as fp32 in a sum of products."""
    first = x.to(gl.float16)
    return first, (x - first.to(gl.float32)).to(gl.float16)


@gluon.jit
def _project_kernel(
    q_ptr, plane_ptr, half_ptr, bf16_ptr, short_ptr, table_ptr, item_seq_ptr, item_start_ptr,
    first_entry_ptr, item_end_ptr, cos_ptr, sin_ptr, basis_ptr, digits_ptr, affine_ptr, slots_ptr,
    num_seqs, table_width, first_position, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, P: gl.constexpr, DIM: gl.constexpr,
    TURN: gl.constexpr, RANK: gl.constexpr, HEAD_BYTES: gl.constexpr, SCALE_AT: gl.constexpr,
    MEAN_AT: gl.constexpr, SLOT_AT: gl.constexpr, INDEX_AT: gl.constexpr, SLOTS: gl.constexpr,
    PAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    item, head = gl.program_id(0), gl.program_id(1)
    seq = gl.load(item_seq_ptr + item)
    if seq < num_seqs:
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
        A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
        HALF: gl.constexpr = DIM // 2
        ROWS: gl.constexpr = PAGES * 4 * P
        start = gl.load(item_start_ptr + item)
        first_entry = gl.load(first_entry_ptr + seq)
        end = gl.load(item_end_ptr + item)
        row_table = table_ptr + seq * table_width

        # the basis, turned so that a product finds it along the dimensions
        L: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, W], [0, 1])
        along = gl.arange(0, HALF, layout=gl.SliceLayout(1, L))
        comp = gl.arange(0, 32, layout=gl.SliceLayout(0, L))
        SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[0, 1])
        low_basis = gl.allocate_shared_memory(gl.float16, [RANK // 32, HALF, 32], SHARED)
        high_basis = gl.allocate_shared_memory(gl.float16, [RANK // 32, HALF, 32], SHARED)
        for i in gl.static_range(RANK // 32):
            basis_at = basis_ptr + (head * RANK + i * 32 + comp)[None, :] * DIM + along[:, None]
            low_basis.index(i).store(gl.load(basis_at).to(gl.float16))
            high_basis.index(i).store(gl.load(basis_at + HALF).to(gl.float16))

        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, A))
        place = gl.arange(0, HALF, layout=gl.SliceLayout(0, A))
        page, tile, group = row // (4 * P), row // P % 4, row % P
        q_at = q_ptr + ((seq * HEADS + head) * GROUP + gl.minimum(group, GROUP - 1))[:, None] * DIM
        out_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
        out_page, out_tile, out_group = out_row // (4 * P), out_row // P % 4, out_row % P
        out_comp = gl.arange(0, 32, layout=gl.SliceLayout(0, MMA))
        column = gl.arange(0, PAGES * 8, layout=gl.SliceLayout(0, B))
        column_page, part = column // 8, column % 8
        e_place = gl.arange(0, HALF, layout=gl.SliceLayout(1, B))
        e_column = gl.arange(0, PAGES * 8, layout=gl.SliceLayout(0, MMA))
        for entry in range(start, end, PAGES):
            low_q = gl.load(q_at + place[None, :]).to(gl.float32)
            high_q = gl.load(q_at + HALF + place[None, :]).to(gl.float32)
            if TURN:
                middle = first_position + gl.minimum(entry + page, end - 1) * 512 + tile * 128 + 64
                angle = middle[:, None] * HALF + place[None, :]
                cos, sin = gl.load(cos_ptr + angle), gl.load(sin_ptr + angle)
                turned = low_q * cos + high_q * sin
                high_q = high_q * cos - low_q * sin
                low_q = turned
            low_a, low_b = _parts(low_q)
            high_a, high_b = _parts(high_q)

            own = entry + out_page
            position = gl.load(row_table + gl.minimum(own, end - 1))
            valid = (position >= 0) & (own < end)
            record = gl.maximum(position, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
            slot = (first_entry + own).to(gl.int64) * HEADS + head
            offset = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, MMA))
            if MEAN_AT >= 0 or SLOTS > 0:
                # what the page holds exactly: its outlier keys and its mean, a column each
                held = gl.load(row_table + gl.minimum(entry + column_page, end - 1))
                begin = gl.where(part < SLOTS, SLOT_AT // 2 + part * DIM, MEAN_AT // 2)
                used = (part < SLOTS) | ((part == SLOTS) & (MEAN_AT >= 0))
                vector = gl.maximum(held, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2) + begin
                e_at = half_ptr + vector[None, :] + e_place[:, None]
                some = used[None, :] & (e_place >= 0)[:, None]
                low_e = gl.load(e_at, mask=some, other=0.0)
                high_e = gl.load(e_at + HALF, mask=some, other=0.0)
                exact = gl.zeros([ROWS, PAGES * 8], gl.float32, layout=MMA)
                exact = mma_v2(low_a, low_e, exact)
                exact = mma_v2(high_a, high_e, exact)
                exact = mma_v2(low_b, low_e, exact)
                exact = mma_v2(high_b, high_e, exact) * scale
                mine = out_page[:, None] == (e_column // 8)[None, :]
                e_part = e_column % 8
                offset = gl.sum(gl.where(mine & (e_part == SLOTS)[None, :], exact, 0.0), axis=1)
                if SLOTS > 0:
                    held = gl.load(row_table + gl.minimum(entry + e_column // 8, end - 1))
                    index = gl.maximum(held, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
                    index = index + INDEX_AT // 2 + gl.minimum(e_part, SLOTS - 1)
                    token = gl.load(short_ptr + index).to(gl.int32)
                    slots_at = (
                        slots_ptr
                        + (slot * (SLOTS * P) + out_group)[:, None]
                        + (e_part * P)[None, :]
                    )
                    hit = mine & (e_part < SLOTS)[None, :] & valid[:, None]
                    hit = hit & (out_tile[:, None] == (token // 128)[None, :])
                    gl.store(slots_at, exact, mask=hit)
            products = ()
            top = gl.full([ROWS], 1e-30, gl.float32, layout=gl.SliceLayout(1, MMA))
            for i in gl.static_range(RANK // 32):
                acc = gl.zeros([ROWS, 32], gl.float32, layout=MMA)
                acc = mma_v2(low_a, low_basis.index(i).load(B), acc)
                acc = mma_v2(high_a, high_basis.index(i).load(B), acc)
                scales = bf16_ptr + (record + SCALE_AT // 2)[:, None] + (i * 32 + out_comp)[None, :]
                acc = acc * gl.load(scales).to(gl.float32)
                top = gl.maximum(top, gl.max(gl.abs(acc), axis=1))
                products = products + (acc,)
            inverse = 16256.0 / top
            to = digits_ptr + ((slot * 4 + out_tile) * 2 * P + 2 * out_group)[:, None] * RANK
            for i in gl.static_range(RANK // 32):
                # the sum rounds to an integer, which then is the low bits of the fp32
                sums = products[i] * inverse[:, None] + 12582912.0
                whole = sums.to(gl.int32, bitcast=True)
                high, low = whole >> 7, whole & 127
                digits = to + (i * 32 + out_comp)[None, :]
                gl.store(digits, high.to(gl.int8), mask=valid[:, None])
                gl.store(digits + RANK, low.to(gl.int8), mask=valid[:, None])

            affine = affine_ptr + (slot * 4 + out_tile) * 2 * P + out_group
            gl.store(affine, top * (scale / 16256.0), mask=valid)
            gl.store(affine + P, offset, mask=valid)


def supports(layout: PageLayout, rotary_dim: int) -> bool:
    """Whether this implementation projects for `layout`; the portable one does the others."""
    return (
        layout.k.shared_basis
        and layout.head_dim in (64, 128)
        and layout.k.rank % CHUNK == 0
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
    basis: Tensor | None,
    plan: DecodePlan,
) -> Projected:
    """`query_projection_triton.project_queries` for layouts that `supports` names."""
    assert basis is not None, "the basis is shared"
    heads, side = layout.num_kv_heads, layout.k
    group, width = group_sizes(q, layout)
    out = Projected.empty(plan.max_entries, layout, width, q.device)
    _project_kernel[(plan.num_items, heads)](
        q.contiguous(), plane, plane.view(torch.float16), plane.view(torch.bfloat16),
        plane.view(torch.int16), table, plan.item_seq, plan.item_start, plan.first_entry,
        plan.item_end, cos, sin, basis, out.digits, out.affine, out.slots,
        q.shape[0], table.stride(0), first_position, scale * LOG2_E,
        HEADS=heads, GROUP=group, P=width, DIM=layout.head_dim, TURN=layout.rope == "frame",
        RANK=side.rank, HEAD_BYTES=layout.head_bytes, SCALE_AT=side.scale_offset,
        MEAN_AT=side.mean_offset, SLOT_AT=side.slot_offset, INDEX_AT=layout.index_offset,
        SLOTS=layout.num_slots, PAGES=max(1, 4 * WARPS // width), W=WARPS, num_warps=WARPS,
    )  # fmt: skip
    return out
