"""Sealing of blocks on a GPU: encoding of exact pages into spectral pages, in Triton.

The twin is the cache's `TorchEncoder`, which encodes by the codec, also for formats with page
bases. A program takes one side of one head of one layer of one block. It does not depend on other
blocks, so a page's bytes are a function of its block only.

```
_project_kernel   read, turn keys, mean, coefficients -> workspace; errors of a first quantization
_quantize_kernel  outlier tokens of both sides -> gains, scales and codes without them -> page
```

Coefficients lie in a bf16 workspace between passes: their rounding (0.1 %) is small beside that of
3-bit codes (18 %). The first quantization does not refit scales, because it only ranks tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.launch.card import Card, halved, limits_of
from spectral_paged.kernels.launch.configs import SealConfig, launcher, seal_config
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, UNIT_BYTES, PageLayout
from spectral_paged.kernels.page.triton import band_tuples, halves, padded
from spectral_paged.kernels.seal.triton.codes import band_codes, code_table, write_codes
from spectral_paged.kernels.seal.triton.exact_tokens import tokens_of
from spectral_paged.kernels.seal.triton.fit import (
    bits_of,
    coefficients,
    energies,
    first_scale,
    fit_gains,
    is_lost,
    level_sizes,
    nearest_levels,
    stored_scale,
)
from spectral_paged.kernels.seal.triton.outliers import ordinary_mean, worst, write_slots

WORKSPACE_BYTES = 256 << 20
MAX_SLOTS = 8

# A launch for some of the blocks begins anywhere in these tensors. Their alignment is no part of a
# build, so that one build serves all launches; nothing is lost, because they are read by element.
BY_BLOCK = ["exact_ptr", "pages_ptr", "first_ptr", "bad_ptr"]


@triton.jit(do_not_specialize_on_alignment=BY_BLOCK)
def _project_kernel(
    values_ptr,
    arena_ptr,
    exact_ptr,
    pages_ptr,
    first_ptr,
    cos_ptr,
    sin_ptr,
    projection_ptr,
    work_ptr,
    power_ptr,
    gains_ptr,
    errors_ptr,
    bad_ptr,
    plane_bytes,
    value_stride,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    SIDE: tl.constexpr,
    TURN: tl.constexpr,
    UNIT: tl.constexpr,
    RANK: tl.constexpr,
    BANDS: tl.constexpr,
    SIZES: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    MEAN_AT: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
):
    item = tl.program_id(0)
    block, layer, head = item // (LAYERS * HEADS), item // HEADS % LAYERS, item % HEADS
    values = values_ptr + layer.to(tl.int64) * value_stride + (head * 2 + SIDE) * (64 * DIM)
    record = arena_ptr + layer.to(tl.int64) * plane_bytes + head * HEAD_BYTES
    record += tl.load(pages_ptr + block).to(tl.int64) * 128
    exact, first = exact_ptr + block * 8, tl.load(first_ptr + block)
    work = work_ptr + item.to(tl.int64) * (512 * RANK_PAD)
    side_item = item * 2 + SIDE
    place, dim, comp = tl.arange(0, ROWS), tl.arange(0, DIM_PAD), tl.arange(0, RANK_PAD)

    if SIDE == 0:  # K is first to write, and zeroes all: unused bytes are zero, as the twin's are
        word = tl.arange(0, 1024)
        end = HEAD_BYTES // 4
        if head == HEADS - 1:
            end = (PAGE_BYTES - (HEADS - 1) * HEAD_BYTES) // 4
        words = record.to(tl.pointer_type(tl.int32))
        for start in range(0, end, 1024):
            at = start + word
            tl.store(words + at, tl.zeros([1024], tl.int32), mask=at < end)
        tl.debug_barrier()
    mean = tl.zeros([DIM_PAD], tl.float32)
    top = tl.zeros([], tl.float32)
    bad = 0
    for start in range(0, 512, ROWS):
        x = tokens_of(
            exact, values, cos_ptr, sin_ptr, first, start + place, dim, TURN, DIM, HALF, UNIT
        )
        size = tl.abs(x)
        bad += tl.sum(tl.where(size <= 3.3e38, 0, 1))
        top = tl.maximum(top, tl.max(size))
        mean += tl.sum(x * (1.0 / 512), axis=0)
    tl.store(bad_ptr + side_item, bad)
    # a power of two, exact, brings values near 1: squares of any finite block fit (decision 0006)
    exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(power_ptr + side_item, inverse)
    errors = errors_ptr + side_item.to(tl.int64) * 512
    if SLOTS > 0 and MEAN_AT >= 0:
        more = 1
        for _ in range(2):  # as often as `page_mean.LOUD_PASSES`
            if more > 0:
                mean, more = ordinary_mean(
                    mean,
                    inverse,
                    errors,
                    exact,
                    values,
                    cos_ptr,
                    sin_ptr,
                    first,
                    TURN,
                    DIM,
                    HALF,
                    UNIT,
                    DIM_PAD,
                    ROWS,
                )
    half_mean = tl.minimum(tl.maximum(mean, -65504.0), 65504.0).to(tl.float16)
    mean = tl.zeros([DIM_PAD], tl.float32)
    if MEAN_AT >= 0:
        mean_at = (record + MEAN_AT).to(tl.pointer_type(tl.float16)) + dim
        tl.store(mean_at, half_mean, mask=dim < DIM)
        mean = half_mean.to(tl.float32)

    basis = projection_ptr + (layer * HEADS + head).to(tl.int64) * (DIM * RANK)
    for first_comp in tl.static_range(0, RANK_PAD, COLUMNS):  # as many as fit shared memory
        column = first_comp + tl.arange(0, COLUMNS)
        used = (dim < DIM)[:, None] & (column < RANK)[None, :]
        matrix = tl.load(basis + dim[:, None] * RANK + column[None, :], mask=used, other=0.0)
        matrix, matrix_rest = halves(matrix)
        for start in range(0, 512, ROWS):
            token = start + place
            x = tokens_of(exact, values, cos_ptr, sin_ptr, first, token, dim, TURN, DIM, HALF, UNIT)
            x, rest = halves((x - mean[None, :]) * inverse)
            found = tl.dot(x, matrix_rest, tl.dot(rest, matrix))
            found = tl.dot(x, matrix, found)
            tl.store(work + token[:, None] * RANK_PAD + column[None, :], found.to(tl.bfloat16))
    tl.debug_barrier()

    if SLOTS > 0:
        none = tl.zeros([8], tl.int32) - 1
        energy = energies(work, none, comp, RANK, RANK_PAD, ROWS)
        gains = gains_ptr + side_item.to(tl.int64) * 512
        weight = fit_gains(work, gains, arena_ptr, energy, none, comp, False, RANK, RANK_PAD, ROWS)
        bits = bits_of(comp, BANDS)
        step = stored_scale(first_scale(energy, weight, bits, SIZES), inverse)[1]
        apart = 1.0 / tl.where(step == 0, 1.0, step)
        for start in range(0, 512, ROWS):
            token = start + place
            x = coefficients(work, token, comp, token * 0, RANK, RANK_PAD)
            gain = tl.load(gains + token)[:, None]
            value = nearest_levels(x / gain * apart[None, :], bits[None, :], SIZES)
            off = x - value * gain * step[None, :]
            tl.store(errors + token, tl.sum(off * off, axis=1))


@triton.jit(do_not_specialize_on_alignment=BY_BLOCK)
def _quantize_kernel(
    values_ptr,
    arena_ptr,
    exact_ptr,
    pages_ptr,
    first_ptr,
    cos_ptr,
    sin_ptr,
    work_ptr,
    power_ptr,
    gains_ptr,
    errors_ptr,
    codes_ptr,
    plane_bytes,
    value_stride,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    SIDE: tl.constexpr,
    TURN: tl.constexpr,
    UNIT: tl.constexpr,
    RANK: tl.constexpr,
    BANDS: tl.constexpr,
    SIZES: tl.constexpr,
    BY_COMPONENT: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    SCALE_AT: tl.constexpr,
    GAIN_AT: tl.constexpr,
    SLOT_AT: tl.constexpr,
    INDEX_AT: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNT_PADS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    item = tl.program_id(0)
    block, layer, head = item // (LAYERS * HEADS), item // HEADS % LAYERS, item % HEADS
    record = arena_ptr + layer.to(tl.int64) * plane_bytes + head * HEAD_BYTES
    record += tl.load(pages_ptr + block).to(tl.int64) * 128
    work = work_ptr + item.to(tl.int64) * (512 * RANK_PAD)
    side_item = item * 2 + SIDE
    gains = gains_ptr + side_item.to(tl.int64) * 512
    place, comp = tl.arange(0, ROWS), tl.arange(0, RANK_PAD)
    inverse = tl.load(power_ptr + side_item)

    outliers = tl.zeros([8], tl.int32) - 1
    if SLOTS > 0:
        outliers = worst(errors_ptr, item, SLOTS)
        values = values_ptr + layer.to(tl.int64) * value_stride + (head * 2 + SIDE) * (64 * DIM)
        write_slots(
            record,
            exact_ptr + block * 8,
            values,
            cos_ptr,
            sin_ptr,
            tl.load(first_ptr + block),
            outliers,
            SIDE,
            TURN,
            DIM,
            HALF,
            UNIT,
            SLOT_AT,
            INDEX_AT,
            DIM_PAD,
        )

    energy = energies(work, outliers, comp, RANK, RANK_PAD, ROWS)
    weight = fit_gains(
        work, gains, record + GAIN_AT, energy, outliers, comp, True, RANK, RANK_PAD, ROWS
    )
    bits = bits_of(comp, BANDS)
    scale = first_scale(energy, weight, bits, SIZES)
    for _ in range(2):  # refits, as many as `quantize.REFITS`
        step = stored_scale(scale, inverse)[1]
        apart = 1.0 / tl.where(step == 0, 1.0, step)
        both = tl.zeros([RANK_PAD], tl.float32)
        own = tl.zeros([RANK_PAD], tl.float32)
        for start in range(0, 512, ROWS):
            token = start + place
            x = coefficients(work, token, comp, is_lost(token, outliers), RANK, RANK_PAD)
            gain = tl.load(gains + token)[:, None]
            value = nearest_levels(x / gain * apart[None, :], bits[None, :], SIZES) * gain
            both += tl.sum(x * value, axis=0)
            own += tl.sum(value * value, axis=0)
        scale = both / tl.maximum(own, 1e-30)
    stored = stored_scale(scale, inverse)[0]
    scale_at = (record + SCALE_AT).to(tl.pointer_type(tl.bfloat16))
    tl.store(scale_at + comp, stored, mask=comp < RANK)
    tl.debug_barrier()

    for b in tl.static_range(len(BANDS)):
        for start in range(0, 512, ROWS):
            codes = band_codes(
                work,
                gains,
                scale_at,
                codes_ptr,
                start + place,
                outliers,
                inverse,
                BANDS,
                b,
                SIZES,
                COUNT_PADS[b],
                RANK_PAD,
            )
            write_codes(record, codes, start, BANDS, b, BY_COMPONENT, COUNT_PADS[b], ROWS)


def supports(layout: PageLayout) -> bool:
    """Return whether this kernel encodes pages of `layout`, as calibrated presets have it."""
    sides = (layout.k, layout.v)
    return (
        layout.levels == "gaussian"
        and layout.rope in ("frame", "post")
        and layout.num_slots <= MAX_SLOTS
        and all(s.shared_basis and s.gain_offset >= 0 and s.scale_groups == 1 for s in sides)
        and all(b.bits < 8 and b.count % 16 == 0 for s in sides for b in s.bands)
        and all(b.bits != 3 or b.count % 32 == 0 for b in layout.k.bands)
    )


@cache
def _projection_tile(dim: int, rank: int, rows: int, card: Card) -> tuple[int, int]:
    """Tokens and components of the tile whose coefficients are computed at once.

    Both operands of the product lie in shared memory, each as two halves of fp16. A program keeps
    at most 16,384 elements of the matrix.
    """
    tokens, components = halved(
        rows,
        min(rank, 16384 // dim),
        fits=lambda r, c: 2 * card.operand_bytes * dim * (r + c) <= card.shared_bytes,
    )
    return tokens, components


def seal(
    planes: Tensor,
    exact: Tensor,
    pages: Tensor,
    first: Tensor,
    *,
    layout: PageLayout,
    dtype: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    k_projection: Tensor,
    v_projection: Tensor,
    config: SealConfig | None = None,
    compile_only: bool = False,
) -> Tensor:
    """Encode blocks from their exact pages into spectral pages, as the codec encodes them.

    Args:
        planes: uint8 `[L, plane_bytes]`, exact pages and spectral pages of L layers.
        exact: int32 `[B, 8]`, units at which each block's exact pages begin.
        pages: int32 `[B]`, units at which the pages to write begin, the same in every layer.
        first: int32 `[B]`, position in its sequence of each block's first token.
        dtype: element type of exact pages.
        cos, sin: fp32 `[max_positions, rotary_dim / 2]`, the model's table.
        k_projection, v_projection: fp32 `[L, H, D, rank]`, the matrices by which a token less its
            page's mean is multiplied to give its coefficients.
        config: launch parameters; the default is `seal_config` of the GPU.
        compile_only: compile the kernels for these arguments, without running them.

    Returns:
        int32 `[B, L, H, 2]`: the number of elements of K and of V that are NaN or Inf. A page with
        such elements is written, and its contents are meaningless.
    """
    if config is None:
        config = seal_config(layout, planes.device)

    num_layers, plane_bytes = planes.shape
    heads, dim = layout.num_kv_heads, layout.head_dim
    device = planes.device
    bad = torch.zeros(len(pages), num_layers, heads, 2, dtype=torch.int32, device=device)
    sides = (layout.k, layout.v)
    ranks = [padded(side.rank) for side in sides]
    commons: list[dict[str, Any]] = [  # arguments of both kernels of a side
        {
            "LAYERS": num_layers,
            "HEADS": heads,
            "DIM": dim,
            "HALF": max(1, cos.shape[-1]),
            "SIDE": index,
            "TURN": index == 0 and layout.rope == "frame",
            "UNIT": UNIT_BYTES // dtype.itemsize,
            "RANK": side.rank,
            "BANDS": band_tuples(side),
            "SIZES": level_sizes(side),
            "HEAD_BYTES": layout.head_bytes,
            "SLOTS": layout.num_slots,
            "DIM_PAD": padded(dim),
            "RANK_PAD": rank,
            "num_warps": config.warps,
            "num_stages": 1,
        }
        for index, (side, rank) in enumerate(zip(sides, ranks, strict=True))
    ]
    per_block = num_layers * heads
    at_once = max(1, WORKSPACE_BYTES // (per_block * sum(ranks) * 2 * BLOCK_TOKENS))
    values = planes.view(dtype)
    for start in range(0, len(pages), at_once):
        span = slice(start, start + at_once)
        items = len(pages[span]) * per_block
        power = torch.empty(items, 2, dtype=torch.float32, device=device)
        gains, errors = torch.empty(2, items, 2, BLOCK_TOKENS, device=device)
        places = (exact[span], pages[span], first[span], cos, sin)
        works = [
            torch.empty(items, BLOCK_TOKENS, rank, dtype=torch.bfloat16, device=device)
            for rank in ranks
        ]
        for side, rank, matrix, work, common in zip(
            sides, ranks, (k_projection, v_projection), works, commons, strict=True
        ):
            rows, columns = _projection_tile(padded(dim), rank, config.rows, limits_of(device))
            launcher(_project_kernel, (items,), compile_only=compile_only)(
                values,
                planes,
                *places,
                matrix,
                work,
                power,
                gains,
                errors,
                bad[span],
                plane_bytes,
                values.shape[1],
                MEAN_AT=side.mean_offset,
                ROWS=rows,
                COLUMNS=columns,
                PAGE_BYTES=layout.page_bytes,
                **common,
            )
        for side, work, common in zip(sides, works, commons, strict=True):
            launcher(_quantize_kernel, (items,), compile_only=compile_only)(
                values,
                planes,
                *places,
                work,
                power,
                gains,
                errors,
                code_table(device),
                plane_bytes,
                values.shape[1],
                BY_COMPONENT=side.by_component,
                SCALE_AT=side.scale_offset,
                GAIN_AT=side.gain_offset,
                SLOT_AT=side.slot_offset,
                INDEX_AT=layout.index_offset,
                COUNT_PADS=tuple(padded(band.count) for band in side.bands),
                ROWS=config.rows,
                **common,
            )
    return bad
