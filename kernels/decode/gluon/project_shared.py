"""The project part of decode from pages that share a basis, with explicit layouts (Gluon).

A program keeps the basis of a KV head in shared memory. Each of its four warps takes the 16 rows
(frames x queries of the head) of another page. Each of the four threads that share a row turns four
of every 16 dimensions, and these are its part of the operand: the order of a sum is free, and the
basis lies in that order. A program takes four of the numbered entries of all sequences at a time,
so short sequences cost no more than long ones.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from spectral_paged.kernels.decode.gluon.operands import after_previous, index_of
from spectral_paged.kernels.decode.gluon.scores import digits_of
from spectral_paged.kernels.decode.parts import LOG2_E, Projected, group_sizes, projection_constants
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.launch.card import limits_of
from spectral_paged.kernels.launch.configs import DecodeConfig, dependent_launch
from spectral_paged.kernels.page.layout import PageLayout


@gluon.constexpr_function
def _power_of_two(rank):
    return 1 << (rank - 1).bit_length()


@gluon.constexpr_function
def _sixteens(half):
    return [[0, 0, 16 << i] for i in range((half // 16).bit_length() - 1)]


@gluon.constexpr_function
def _rows_layout(half):
    """`[4 pages, 16, half]`: a thread has two rows, and four of every 16 dimensions."""
    regs = [[0, 0, 1], [0, 0, 2], *_sixteens(half), [0, 8, 0]]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[1, 0, 0], [2, 0, 0]], [], [4, 16, half])


@gluon.constexpr_function
def _vectors_layout(half):
    """`[4 pages, 8, half]`: a thread has a vector of a page, and four of every 16 dimensions."""
    regs = [[0, 0, 1], [0, 0, 2], *_sixteens(half)]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[1, 0, 0], [2, 0, 0]], [], [4, 8, half])


@gluon.constexpr_function
def _found_layout(chunk):
    """`[4 pages, 16, chunk]`: a thread has consecutive components, one store of digits a row."""
    own = chunk // 4
    regs = [[0, 0, 1 << i] for i in range(own.bit_length() - 1)] + [[0, 8, 0]]
    lanes = [[0, 0, own], [0, 0, 2 * own], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[1, 0, 0], [2, 0, 0]], [], [4, 16, chunk])


@gluon.constexpr_function
def _basis_shared(half, groups):
    """Basis rows in shared memory, without bank conflicts of stores or matrix loads; with `groups`
    as a warp group's product reads them."""
    if groups:
        return gl.NVMMASharedLayout(swizzle_byte_width=2 * half, element_bitwidth=16, rank=2)
    return gl.SwizzledSharedLayout(8, 128 // (2 * half), half // 8, order=[1, 0])


@gluon.constexpr_function
def _rows_mma(chunk, groups):
    """An accumulator `[64, chunk]`, of which a warp has the rows of its page."""
    if groups:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, chunk, 16])
    return gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])


@gluon.jit
def _in_steps(x):
    """`x` `[n, dims]` in the order of a sum that takes, of every 16 dimensions, 4 j .. 4 j + 3 from
    thread j of four."""
    N: gl.constexpr = x.shape[0]
    DIMS: gl.constexpr = x.shape[1]
    x = gl.reshape(x, (N, DIMS // 16, 4, 2, 2))  # [n, step, j, h, e]
    return gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), (N, DIMS))


@gluon.jit
def _first(x, MMA: gl.constexpr):
    """fp16 rows `[4, 16, dims]` as the first operand `[64, dims]`."""
    x = _in_steps(gl.reshape(x, (64, x.shape[2])))
    return gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _by_page(x, INDEX: gl.constexpr, PAGES: gl.constexpr):
    """fp16 vectors `[4, n, dims]` as an operand of a batch of products, one a page."""
    N: gl.constexpr = x.shape[1]
    DIMS: gl.constexpr = x.shape[2]
    x = gl.reshape(_in_steps(gl.reshape(x, (4 * N, DIMS))), (4, N, DIMS))
    if INDEX == 1:
        x = gl.permute(x, (0, 2, 1))
    return gl.convert_layout(x, gl.DotOperandLayout(INDEX, PAGES, 2), assert_trivial=True)


@gluon.jit
def _in_order(acc, R: gl.constexpr):
    """The components of an accumulator `[64, C]` in order; no data moves between threads.

    Column 8 n + 2 j + e of the accumulator is component C j / 4 + 2 n + e.
    """
    C: gl.constexpr = acc.shape[1]
    acc = gl.permute(gl.reshape(acc, (4, 16, C // 8, 4, 2)), (0, 1, 3, 2, 4))
    return gl.convert_layout(gl.reshape(acc, (4, 16, C)), R, assert_trivial=True)


@gluon.jit
def _found_at(table_ptr, entry_seq_ptr, first_entry_ptr, table_width, entry, total):
    """Sequence, place in its table and page of numbered entries; past the last the page is -1."""
    seq = gl.load(entry_seq_ptr + gl.minimum(entry, total - 1))
    place = gl.minimum(entry, total - 1) - gl.load(first_entry_ptr + seq)
    position = gl.load(table_ptr + seq * table_width + place, mask=entry < total, other=-1)
    return seq, place, position


@gluon.jit
def _fetch_ahead(
    half_ptr,
    table_ptr,
    entry_seq_ptr,
    first_entry_ptr,
    table_width,
    begin,
    total,
    stride,
    head,
    HEAD_BYTES: gl.constexpr,
    SCALE_AT: gl.constexpr,
):
    """Fetch 2 KB of each page, from its scales on, into L2: all that a program reads of it."""
    AHEAD: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    place = gl.arange(0, 8, layout=gl.SliceLayout(1, AHEAD))
    line = gl.arange(0, 16, layout=gl.SliceLayout(0, AHEAD))
    for first in range(begin, total, 2 * stride):
        entry = first + place // 4 * stride + place % 4
        _, _, position = _found_at(
            table_ptr, entry_seq_ptr, first_entry_ptr, table_width, entry, total
        )
        record = gl.maximum(position, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
        at = half_ptr + (record + SCALE_AT // 2)[:, None] + line[None, :] * 64
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(gl.int64)], gl.int32, False, 1
        )


@gluon.jit(do_not_specialize=["num_seqs"])
def _project_kernel(
    q_ptr,
    half_ptr,
    bf16_ptr,
    short_ptr,
    table_ptr,
    entry_seq_ptr,
    first_entry_ptr,
    cos_ptr,
    sin_ptr,
    basis_ptr,
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
    HEAD_BYTES: gl.constexpr,
    SCALE_AT: gl.constexpr,
    MEAN_AT: gl.constexpr,
    SLOT_AT: gl.constexpr,
    INDEX_AT: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUPS: gl.constexpr,
    PDL: gl.constexpr,
):
    after_previous(PDL)
    head = gl.program_id(1)
    begin, stride = gl.program_id(0) * 4, gl.num_programs(0) * 4
    total = gl.load(first_entry_ptr + num_seqs)
    if begin < total:
        HALF: gl.constexpr = DIM // 2
        CHUNK: gl.constexpr = 64 if RANK % 64 == 0 else 32  # components of one product
        ROWS: gl.constexpr = _power_of_two(RANK)
        MMA: gl.constexpr = _rows_mma(CHUNK, GROUPS)
        PAGES: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
        R: gl.constexpr = _found_layout(CHUNK)
        A: gl.constexpr = _rows_layout(HALF)
        E: gl.constexpr = _vectors_layout(HALF)
        FILL: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
        first_tile = gl.program_id(2) * (16 // P)  # programs share a page's frames
        _fetch_ahead(
            half_ptr,
            table_ptr,
            entry_seq_ptr,
            first_entry_ptr,
            table_width,
            begin,
            total,
            stride,
            head,
            HEAD_BYTES,
            SCALE_AT,
        )

        basis = gl.allocate_shared_memory(gl.float16, [2, ROWS, HALF], _basis_shared(HALF, GROUPS))
        row = gl.minimum(gl.arange(0, ROWS, layout=gl.SliceLayout(1, FILL)), RANK - 1)
        b_comp = (  # see `_in_order`
            row // CHUNK * CHUNK + row % 8 // 2 * (CHUNK // 4) + row % CHUNK // 8 * 2 + row % 2
        )
        b_place = gl.arange(0, HALF, layout=gl.SliceLayout(0, FILL))
        b_at = basis_ptr + (head * RANK + b_comp)[:, None] * DIM + b_place[None, :]
        basis.index(0).store(_in_steps(gl.load(b_at).to(gl.float16)))
        basis.index(1).store(_in_steps(gl.load(b_at + HALF).to(gl.float16)))
        if GROUPS:
            fence_async_shared()

        a_row, a_place = index_of(16, A, 1), index_of(HALF, A, 2)
        group = gl.minimum(a_row % P, GROUP - 1)
        e_part, e_place = index_of(8, E, 1), index_of(HALF, E, 2)
        e_used = (e_part < SLOTS) | ((e_part == SLOTS) & (MEAN_AT >= 0))
        e_begin = gl.where(e_part < SLOTS, SLOT_AT // 2 + e_part * DIM, MEAN_AT // 2)
        e_at = e_begin + e_place
        m_row, place = index_of(16, PAGES, 1), index_of(8, PAGES, 2)
        m_tile, m_group = first_tile + m_row // P, m_row % P
        r_row, comp = index_of(16, R, 1), index_of(CHUNK, R, 2)
        r_tile, r_group = first_tile + r_row // P, r_row % P
        ahead = _found_at(
            table_ptr,
            entry_seq_ptr,
            first_entry_ptr,
            table_width,
            begin + index_of(4, R, 0),
            total,
        )
        for first in range(begin, total, stride):
            # the next pages are looked up, one load behind the other, while these are computed
            seq, place_in_seq, position = ahead
            ahead = _found_at(
                table_ptr,
                entry_seq_ptr,
                first_entry_ptr,
                table_width,
                first + stride + index_of(4, R, 0),
                total,
            )
            a_seq = gl.convert_layout(seq, A, assert_trivial=True)
            a_entry = gl.convert_layout(place_in_seq, A, assert_trivial=True)
            r_entry, m_entry = first + index_of(4, R, 0), first + index_of(4, PAGES, 0)
            # scales, outlier keys and the mean arrive while the query is turned
            r_record = gl.maximum(position, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
            units = ()
            for i in gl.static_range(RANK // CHUNK):
                units = units + (gl.load(bf16_ptr + r_record + SCALE_AT // 2 + i * CHUNK + comp),)
            if MEAN_AT >= 0 or SLOTS > 0:
                e_position = gl.convert_layout(position, E, assert_trivial=True)
                e_record = gl.maximum(e_position, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
                e_some = e_used & (e_record + e_place >= 0)
                low_e = gl.load(half_ptr + (e_record + e_at), mask=e_some, other=0.0)
                high_e = gl.load(half_ptr + (e_record + e_at + HALF), mask=e_some, other=0.0)
            if SLOTS > 0:
                m_position = gl.convert_layout(position, PAGES, assert_trivial=True)
                m_record = gl.maximum(m_position, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2)
                token = gl.load(
                    short_ptr + (m_record + INDEX_AT // 2 + gl.minimum(place, SLOTS - 1))
                ).to(gl.int32)

            q_at = q_ptr + ((a_seq * HEADS + head) * GROUP + group) * DIM + a_place
            low, high = gl.load(q_at), gl.load(q_at + HALF)
            low_q, high_q = low.to(gl.float32), high.to(gl.float32)
            if TURN:
                tile = a_entry * 4 + first_tile + a_row // P
                angle = (first_position + tile * 128 + 64) * HALF + a_place
                cos, sin = gl.load(cos_ptr + angle), gl.load(sin_ptr + angle)
                turned = low_q * cos + high_q * sin
                high_q = high_q * cos - low_q * sin
                low_q = turned
            low_a, high_a = low_q.to(gl.float16), high_q.to(gl.float16)

            m_slot = m_entry.to(gl.int64) * HEADS + head
            offset = gl.zeros([4, 16], gl.float32, layout=gl.SliceLayout(2, PAGES))
            if MEAN_AT >= 0 or SLOTS > 0:
                low_b = (low_q - low_a.to(gl.float32)).to(gl.float16)
                high_b = (high_q - high_a.to(gl.float32)).to(gl.float16)
                low_e, high_e = _by_page(low_e, 1, PAGES), _by_page(high_e, 1, PAGES)
                exact = gl.zeros([4, 16, 8], gl.float32, layout=PAGES)
                exact = mma_v2(_by_page(low_a, 0, PAGES), low_e, exact)
                exact = mma_v2(_by_page(high_a, 0, PAGES), high_e, exact)
                exact = mma_v2(_by_page(low_b, 0, PAGES), low_e, exact)
                exact = mma_v2(_by_page(high_b, 0, PAGES), high_e, exact) * scale
                offset = gl.sum(gl.where(place == SLOTS, exact, 0.0), axis=2)
                if SLOTS > 0:
                    hit = (place < SLOTS) & (m_tile == token // 128) & (m_position >= 0)
                    gl.store(slots_ptr + (m_slot * SLOTS + place) * P + m_group, exact, mask=hit)
            affine = affine_ptr + (m_slot * 4 + m_tile) * 2 * P + P + m_group
            gl.store(affine, gl.expand_dims(offset, 2), mask=m_entry + m_row * 0 < total)

            low_a, high_a = _first(low_a, MMA), _first(high_a, MMA)
            products = ()
            top = gl.full([4, 16], 1e-30, gl.float32, layout=gl.SliceLayout(2, R))
            for i in gl.static_range(RANK // CHUNK):
                acc = gl.zeros([64, CHUNK], gl.float32, layout=MMA)
                for j in gl.static_range(2):
                    rows = basis.index(j).slice(i * CHUNK, CHUNK, dim=0).permute((1, 0))
                    if GROUPS:
                        acc = warpgroup_mma(low_a if j == 0 else high_a, rows, acc)
                    else:
                        rows = rows.load(gl.DotOperandLayout(1, MMA, 2))
                        acc = mma_v2(low_a if j == 0 else high_a, rows, acc)
                found = _in_order(acc, R) * units[i].to(gl.float32)
                top = gl.maximum(top, gl.max(gl.abs(found), axis=2))
                products = products + (found,)
            r_slot = r_entry.to(gl.int64) * HEADS + head
            r_ok = r_entry + r_row * 0 < total
            top = gl.expand_dims(top, 2)
            inverse = 16256.0 / top
            to = digits_ptr + ((r_slot * 4 + r_tile) * 2 * P + 2 * r_group) * RANK
            for i in gl.static_range(RANK // CHUNK):
                high_digit, low_digit = digits_of(products[i] * inverse)
                gl.store(to + (i * CHUNK + comp), high_digit, mask=r_ok)
                gl.store(to + (RANK + i * CHUNK + comp), low_digit, mask=r_ok)
            affine = affine_ptr + (r_slot * 4 + r_tile) * 2 * P + r_group
            gl.store(affine, top * (scale / 16256.0), mask=r_ok)


def supports(layout: PageLayout, rotary_dim: int) -> bool:
    """Return whether this kernel projects for `layout`; Triton's projects for the others."""
    return (
        layout.head_dim in (64, 128)
        and layout.k.shared_basis
        and layout.k.rank % 32 == 0
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
    basis: Tensor,
    plan: DecodePlan,
    config: DecodeConfig,
) -> Projected:
    """`triton.project.project_queries` for the layouts of `supports`: the same arguments."""
    heads, width = layout.num_kv_heads, group_sizes(q, layout)[1]
    out = Projected.empty(plan.max_entries, layout, width, q.device)
    parts = width // 4  # programs that share a page's frames
    programs = min(triton.cdiv(plan.max_entries, 4), max(1, config.project_programs // heads))
    _project_kernel[(programs, heads, parts)](
        q.contiguous(),
        plane.view(torch.float16),
        plane.view(torch.bfloat16),
        plane.view(torch.int16),
        table,
        plan.entry_seq,
        plan.first_entry,
        cos,
        sin,
        basis,
        out.digits,
        out.affine,
        out.slots,
        q.shape[0],
        table.stride(0),
        first_position,
        scale * LOG2_E,
        **projection_constants(q, layout),
        GROUPS=limits_of(q.device).has_warp_groups,
        num_warps=4,
        maxnreg=config.project_registers,
        **dependent_launch(q.device),
    )
    return out
