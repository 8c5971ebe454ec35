"""Rebuilding of K and V from pages, for chunked prefill, in Triton."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.launch.card import Card, halved, limits_of
from spectral_paged.kernels.launch.configs import launcher
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, TILE_TOKENS, PageLayout
from spectral_paged.kernels.page.triton import (
    band_tuples,
    check_scales,
    halves,
    level_table,
    load_rows,
    load_values,
    padded,
)
from spectral_paged.kernels.rebuild.reference import PagePlaces


@triton.jit
def _half_rows(
    record,
    basis_ptr,
    levels_ptr,
    head,
    comp,
    dims,
    ok,
    scale,
    SHARED: tl.constexpr,
    BANDS: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
):
    """Basis rows at some dimensions times the page's scales, fp32 split into two fp16."""
    if SHARED:
        at = basis_ptr + (head * RANK + comp)[:, None] * DIM + dims[None, :]
        rows = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    else:
        rows = load_rows(record, levels_ptr, comp[:, None], dims[None, :], BANDS, RANK, DIM)
        rows = tl.where(ok, rows, 0.0)
    return halves(rows * scale[:, None])


# not specialized, because a sequence's pages begin anywhere in the table: one build serves all
@triton.jit(do_not_specialize_on_alignment=["units_ptr", "blocks_ptr", "rows_ptr"])
def _rebuild_kernel(
    plane_ptr,
    units_ptr,
    blocks_ptr,
    rows_ptr,
    cos_ptr,
    sin_ptr,
    basis_ptr,
    levels_ptr,
    row_levels_ptr,
    out_ptr,
    head_stride,
    first_position,
    TURN: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    SHARED: tl.constexpr,
    RANK: tl.constexpr,
    BANDS: tl.constexpr,
    BY_COMPONENT: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    SCALE_AT: tl.constexpr,
    GAIN_AT: tl.constexpr,
    MEAN_AT: tl.constexpr,
    SLOT_AT: tl.constexpr,
    INDEX_AT: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK_PAD: tl.constexpr,
    COMPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Rebuild `PAIRS` pairs of dimensions of a tile of 128 tokens of one side, from `COMPS`
    components at a time. `TURN` keys: 0 none, 1 by frame, 2 by token."""
    entry, head = tl.program_id(0), tl.program_id(1)
    tile, part = tl.program_id(2) % 4, tl.program_id(2) // 4
    unit = tl.load(units_ptr + entry)
    if unit >= 0:
        record = plane_ptr + unit.to(tl.int64) * 128 + head * HEAD_BYTES
        token, place = tl.arange(0, 128), part * PAIRS + tl.arange(0, PAIRS)
        low_dim = tl.where(place < HALF, place, place + HALF)
        high_dim = tl.where(place < HALF, place + HALF, place + DIM // 2)
        there = place < DIM // 2
        low = tl.zeros([128, PAIRS], tl.float32)
        high = tl.zeros([128, PAIRS], tl.float32)
        for start in range(0, RANK_PAD, COMPS):
            comp = start + tl.arange(0, COMPS)
            ok = (comp < RANK)[:, None] & there[None, :]
            scale = tl.load(
                (record + SCALE_AT).to(tl.pointer_type(tl.bfloat16)) + comp,
                mask=comp < RANK,
                other=0.0,
            ).to(tl.float32)
            codes = load_values(
                record,
                levels_ptr,
                tile,
                token[None, :] if BY_COMPONENT else token[:, None],
                comp[:, None] if BY_COMPONENT else comp[None, :],
                BANDS,
                BY_COMPONENT,
                RANK,
            ).to(tl.float16)
            if BY_COMPONENT:
                codes = tl.trans(codes)
            first, rest = _half_rows(
                record,
                basis_ptr,
                row_levels_ptr,
                head,
                comp,
                low_dim,
                ok,
                scale,
                SHARED,
                BANDS,
                RANK,
                DIM,
            )
            low = tl.dot(codes, rest, tl.dot(codes, first, low))
            first, rest = _half_rows(
                record,
                basis_ptr,
                row_levels_ptr,
                head,
                comp,
                high_dim,
                ok,
                scale,
                SHARED,
                BANDS,
                RANK,
                DIM,
            )
            high = tl.dot(codes, rest, tl.dot(codes, first, high))
        if GAIN_AT >= 0:
            gain = tl.load(record + GAIN_AT + tile * 128 + token).to(tl.float32)
            gain = tl.exp2((gain - 128.0) * 0.0625)
            low, high = low * gain[:, None], high * gain[:, None]
        if MEAN_AT >= 0:
            mean = (record + MEAN_AT).to(tl.pointer_type(tl.float16))
            low += tl.load(mean + low_dim, mask=there, other=0.0).to(tl.float32)[None, :]
            high += tl.load(mean + high_dim, mask=there, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(SLOTS):
            slot = tl.load((record + INDEX_AT).to(tl.pointer_type(tl.int16)) + j)
            hit = (token == slot - tile * 128)[:, None]
            exact = (record + SLOT_AT).to(tl.pointer_type(tl.float16)) + j * DIM
            own = tl.load(exact + low_dim, mask=there, other=0.0).to(tl.float32)
            low = tl.where(hit, own[None, :], low)
            own = tl.load(exact + high_dim, mask=there, other=0.0).to(tl.float32)
            high = tl.where(hit, own[None, :], high)
        if TURN > 0:
            at = first_position + tl.load(blocks_ptr + entry) * 512 + tile * 128
            at = at + token if TURN == 2 else at + 64 + token * 0
            angle = at[:, None] * HALF + place[None, :]
            use = (place < HALF)[None, :] & (token >= 0)[:, None]
            cos = tl.load(cos_ptr + angle, mask=use, other=1.0)
            sin = tl.load(sin_ptr + angle, mask=use, other=0.0)
            turned = low * cos - high * sin
            high = high * cos + low * sin
            low = turned
        row = tl.load(rows_ptr + entry) + tile * 128 + token
        to = out_ptr + head.to(tl.int64) * head_stride + row[:, None] * DIM
        both = (token >= 0)[:, None] & there[None, :]
        tl.store(to + low_dim[None, :], low, mask=both)
        tl.store(to + high_dim[None, :], high, mask=both)


@cache
def _tile(half: int, rank: int, card: Card) -> tuple[int, int]:
    """Components and pairs of dimensions that a program takes at once.

    It keeps 128 codes of each component and two fp16 parts of their basis rows, and two results of
    each token and pair. Operands that pass through registers are smaller.
    """
    most, pairs = (32, 64) if card.has_tensor_cores else (16, 32)
    if card.has_warp_groups:
        most = 128
    pairs = min(half, pairs)
    [comps] = halved(
        min(rank, most),
        fits=lambda comps: (
            comps * (128 + 2 * pairs) * card.operand_bytes <= card.shared_bytes * 2 // 3
        ),
    )
    return comps, pairs


def spectral_rebuild(
    plane: Tensor,
    units: Tensor,
    *,
    layout: PageLayout,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype,
    k_basis: Tensor | None = None,
    v_basis: Tensor | None = None,
    num_pages: int | None = None,
    places: PagePlaces | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    compile_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rebuild.reference.spectral_rebuild` in Triton: the same arguments and results.

    Args:
        compile_only: compile the kernel for these arguments, without running it.

    Raises:
        ValueError: a component has more than one scale.
    """
    check_scales(layout)
    if places is None:
        present = units >= 0
        count = int(present.sum()) if num_pages is None else num_pages
        rows = (present.to(torch.int32).cumsum(0, dtype=torch.int32) - 1) * BLOCK_TOKENS
        places = PagePlaces(torch.arange(len(units), device=plane.device).int(), rows)
    else:
        count = len(units)
    heads, dim = layout.num_kv_heads, layout.head_dim
    if out is None:
        shape = heads, count * BLOCK_TOKENS, dim
        out = (
            torch.empty(shape, dtype=dtype, device=plane.device),
            torch.empty(shape, dtype=dtype, device=plane.device),
        )
    if not count:
        return out
    turn = {"post": 0, "frame": 1, "pre": 2}[layout.rope]
    sides = ((layout.k, k_basis, turn, out[0]), (layout.v, v_basis, 0, out[1]))
    for side, basis, turned, to in sides:
        half, rank = padded(dim // 2), padded(side.rank)
        comps, pairs = _tile(half, rank, limits_of(plane.device))
        grid = len(units), heads, BLOCK_TOKENS // TILE_TOKENS * (half // pairs)
        launcher(_rebuild_kernel, grid, compile_only=compile_only)(
            plane,
            units,
            places.blocks,
            places.rows,
            cos,
            sin,
            plane if basis is None else basis,
            level_table(layout.levels, plane.device),
            level_table("gaussian", plane.device),
            to,
            to.stride(0),
            first_position,
            TURN=turned,
            DIM=dim,
            HALF=cos.shape[-1],
            SHARED=side.shared_basis,
            RANK=side.rank,
            BANDS=band_tuples(side),
            BY_COMPONENT=side.by_component,
            HEAD_BYTES=layout.head_bytes,
            SCALE_AT=side.scale_offset,
            GAIN_AT=side.gain_offset,
            MEAN_AT=side.mean_offset,
            SLOT_AT=side.slot_offset,
            INDEX_AT=layout.index_offset,
            SLOTS=layout.num_slots,
            RANK_PAD=rank,
            COMPS=comps,
            PAIRS=pairs,
            num_warps=4 if rank <= 128 else 8,
            num_stages=1,
        )
    return out
