"""Application of V's page bases to partial results, with explicit layouts (Gluon).

A program is one warp: it takes 64 dimensions of the pages of one item. The first operand has each
query in two rows: its fp16 rounding, and the rest. Two byte permutes and a subtraction turn a
thread's wide load of basis bytes into fp16.
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
from spectral_paged.kernels.decode.parts import Partials, adds_values, group_sizes
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.configs import DecodeConfig, dependent_launch
from spectral_paged.kernels.page.layout import PageLayout


@gluon.constexpr_function
def _basis_layout(rank):
    """`[rank, 64]`: a thread has eight consecutive dimensions of a quarter of the components."""
    regs = [[0, 1], [0, 2], [0, 4]] + [[1 << i, 0] for i in range((rank // 4).bit_length() - 1)]
    lanes = [[rank // 4, 0], [rank // 2, 0], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [rank, 64])


@gluon.jit
def _basis_operand(x, MMA: gl.constexpr):
    """`[rank, 64]` of `_basis_layout` as the second operand of a sum over components: column
    8 n + c is dimension 8 c + n."""
    RANK: gl.constexpr = x.shape[0]
    x = gl.reshape(x, (4, RANK // 16, 2, 2, 8, 8))  # [j, step, h, e, c, n]
    x = gl.reshape(gl.permute(x, (1, 2, 0, 3, 5, 4)), (RANK, 64))
    return gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit(do_not_specialize=["num_seqs"])
def _apply_kernel(
    plane_ptr,
    half_ptr,
    table_ptr,
    item_seq_ptr,
    item_start_ptr,
    first_entry_ptr,
    item_end_ptr,
    vectors_ptr,
    sums_ptr,
    out_ptr,
    out_sums_ptr,
    num_seqs,
    table_width,
    HEADS: gl.constexpr,
    P: gl.constexpr,
    DIM: gl.constexpr,
    RANK: gl.constexpr,
    BASIS_AT: gl.constexpr,
    HEAD_BYTES: gl.constexpr,
    MEAN_AT: gl.constexpr,
    VALUES: gl.constexpr,
    ROWS: gl.constexpr,
    PDL: gl.constexpr,
):
    after_previous(PDL)
    item, head = gl.program_id(0), gl.program_id(1)
    first_dim = gl.program_id(2) * 64
    seq = gl.load(item_seq_ptr + item)
    if seq < num_seqs:
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
        A: gl.constexpr = dims_layout(ROWS, RANK)
        B: gl.constexpr = _basis_layout(RANK)
        OUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [1, 1], [1, 0])
        SIZE: gl.constexpr = RANK + DIM if VALUES else RANK
        first_entry = gl.load(first_entry_ptr + seq)
        a_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, A))
        a_comp = gl.arange(0, RANK, layout=gl.SliceLayout(0, A))
        a_at = (a_row % P * SIZE)[:, None] + a_comp[None, :]
        a_ok = (a_row < 2 * P)[:, None] & (a_comp >= 0)[None, :]
        comp = gl.arange(0, RANK, layout=gl.SliceLayout(1, B))
        dim = gl.arange(0, 64, layout=gl.SliceLayout(0, B))
        b_at = BASIS_AT + comp[:, None] * DIM + first_dim + dim[None, :]
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))
        out_dim = first_dim + column % 8 * 8 + column // 8
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, MMA))
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, MMA))
        acc = gl.zeros([ROWS, 64], gl.float32, layout=MMA)
        start, end = gl.load(item_start_ptr + item), gl.load(item_end_ptr + item)
        row_table = table_ptr + seq * table_width
        for entry in range(start, end):
            position = gl.load(row_table + entry)
            if position >= 0:
                record = position.to(gl.int64) * 128 + head * HEAD_BYTES
                slot = (first_entry + entry).to(gl.int64) * HEADS + head
                rows = _basis_operand(half_integers(gl.load(plane_ptr + record + b_at)), MMA)
                part = gl.load(vectors_ptr + slot * P * SIZE + a_at, mask=a_ok, other=0.0)
                sums = sums_ptr + slot * 2 * P + row % P
                peak, own = gl.load(sums), gl.load(sums + P)
                new_top = gl.maximum(top, peak)
                safe = gl.where(new_top == float("-inf"), 0.0, new_top)
                shrink, weight = gl.exp2(top - safe), gl.exp2(peak - safe)
                top = new_top
                own = own * weight
                total = total * shrink + own
                largest = gl.maximum(gl.max(gl.abs(part), axis=1), 1e-30)
                unit = part / largest[:, None]
                rest = unit - unit.to(gl.float16).to(gl.float32)
                unit = gl.where((a_row < P)[:, None], unit, rest).to(gl.float16)
                found = gl.zeros([ROWS, 64], gl.float32, layout=MMA)
                found = mma_v2(from_dims(unit, 0, MMA), rows, found)
                factor = gl.convert_layout(largest, gl.SliceLayout(1, MMA)) * weight
                acc = acc * shrink[:, None] + found * factor[:, None]
                if VALUES:
                    at = vectors_ptr + (slot * P + row % P)[:, None] * SIZE + RANK
                    once = (row < P)[:, None] & (column >= 0)[None, :]
                    value = gl.load(at + out_dim[None, :], mask=once, other=0.0)
                    acc += value * weight[:, None]
                elif MEAN_AT >= 0:
                    mean = gl.load(half_ptr + record // 2 + MEAN_AT // 2 + out_dim)
                    acc += mean.to(gl.float32)[None, :] * gl.where(row < P, own, 0.0)[:, None]
        # both roundings of a query together, dimensions in order
        whole = gl.sum(gl.reshape(acc, (ROWS // P, P, 64)), axis=0)
        whole = gl.reshape(gl.permute(gl.reshape(whole, (P, 8, 8)), (0, 2, 1)), (P, 64))
        whole = gl.convert_layout(whole, OUT)
        group = gl.arange(0, P, layout=gl.SliceLayout(1, OUT))
        dim = gl.arange(0, 64, layout=gl.SliceLayout(0, OUT))
        out = item.to(gl.int64) * HEADS + head
        to = out_ptr + (out * P + group)[:, None] * DIM + first_dim + dim[None, :]
        gl.store(to, whole)
        gl.store(out_sums_ptr + out * 2 * P + row, top, mask=row < P)
        gl.store(out_sums_ptr + (out * 2 + 1) * P + row, total, mask=row < P)


def supports(layout: PageLayout) -> bool:
    """Return whether this kernel applies the page bases of `layout`; Triton's applies others."""
    side = layout.v
    return (
        not side.shared_basis
        and layout.head_dim in (64, 128)
        and side.rank in (16, 32, 64, 128)
        and len(side.bands) == 1  # rows of further bands lie behind their own codes
        and side.bands[0].basis_bits == 8
    )


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
    """`triton.apply.apply_bases` for the layouts of `supports`: the same arguments and results."""
    heads, dim, side = layout.num_kv_heads, layout.head_dim, layout.v
    width = group_sizes(q, layout)[1]
    # a limit that fits rows of 8 queries would spill with those of 16
    registers = config.apply_registers if width <= 8 else None
    out = Partials.sized(plan.num_items, layout, width, dim, q.device)
    _apply_kernel[(plan.num_items, heads, dim // 64)](
        plane,
        plane.view(torch.float16),
        table,
        plan.item_seq,
        plan.item_start,
        plan.first_entry,
        plan.item_end,
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
        BASIS_AT=side.bands[0].basis_offset,
        HEAD_BYTES=layout.head_bytes,
        MEAN_AT=side.mean_offset,
        VALUES=adds_values(layout),
        ROWS=max(16, 2 * width),
        num_warps=1,
        maxnreg=registers,
        **dependent_launch(q.device),
    )
    return out
