"""Seal blocks on a GPU: encode exact pages into spectral pages where they lie, in Triton.

The twin is `spectral_paged.codec.encode_pages`, for formats whose basis is shared. A program takes
one side of one head of one layer of one block; nothing it does depends on another, so a page's
bytes are a function of its block alone.

```
_project_kernel   read, turn keys, mean, coefficients -> workspace; errors of a first quantization
_quantize_kernel  outlier tokens of both sides -> gains, scales and codes without them -> page
```

Coefficients wait in a workspace of bf16 between passes: their rounding (0.1 %) is lost in that of
3-bit codes (18 %). The first quantization has no refitted scales; it only ranks tokens.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.layout import (
    BLOCK_TOKENS,
    LEVEL_UNIT,
    LEVELS,
    UNIT_BYTES,
    PageLayout,
    SideLayout,
)
from spectral_paged.kernels.triton_page import band_tuples, padded

WORKSPACE_BYTES = 256 << 20
MAX_SLOTS = 8
ROWS = 64  # tokens that a pass takes at once
WARPS = 4


@triton.jit
def _tokens_of(
    pages_ptr, values_ptr, cos_ptr, sin_ptr, first, token, dim,
    TURN: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """fp32 rows of the block's `token`s, keys turned back with their frame."""
    page = tl.load(pages_ptr + token // 64).to(tl.int64)
    row = values_ptr + (page * UNIT + token % 64 * DIM)[:, None]
    there = (dim < DIM)[None, :] & (token >= 0)[:, None]
    x = tl.load(row + dim[None, :], mask=there, other=0.0).to(tl.float32)
    if TURN:
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        turned = (dim < 2 * HALF)[None, :] & there
        y = tl.load(row + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        middle = first + token // 128 * 128 + 64
        angle = middle[:, None] * HALF + (dim % HALF)[None, :]
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        sign = tl.where(dim < HALF, 1.0, -1.0)[None, :]
        # a table scaled by s turns back by 1 / s^2, as `rotary.rotate` does
        x = (x * cos + sign * sin * y) / (cos * cos + sin * sin)
    return x


@triton.jit
def _halves(x):
    """fp32 as two fp16, as good as fp32 in a sum of products of values near 1."""
    first = x.to(tl.float16)
    return first, (x - first.to(tl.float32)).to(tl.float16)


@triton.jit
def _coefficients(work_ptr, token, comp, lost, RANK: tl.constexpr, RANK_PAD: tl.constexpr):
    """fp32 rows of the workspace, those of outlier tokens (`lost`) zeroed."""
    at = work_ptr + token[:, None] * RANK_PAD + comp[None, :]
    kept = (comp < RANK)[None, :] & (lost == 0)[:, None]
    return tl.load(at, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def _is_lost(token, outliers):
    """1 for tokens among `outliers`."""
    return tl.sum((token[:, None] == outliers[None, :]).to(tl.int32), axis=1)


@triton.jit
def _energy(
    work_ptr, outliers, comp, RANK: tl.constexpr, RANK_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """Mean square of every component."""
    energy = tl.zeros([RANK_PAD], tl.float32)
    for start in range(0, 512, ROWS):
        token = start + tl.arange(0, ROWS)
        x = _coefficients(work_ptr, token, comp, _is_lost(token, outliers), RANK, RANK_PAD)
        energy += tl.sum(x * x, axis=0)
    return energy / 512


@triton.jit
def _gains(
    work_ptr, gains_ptr, codes_ptr, energy, outliers, comp,
    STORE: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gains of all tokens to `gains_ptr`, and their codes to the page; the sum of their squares.

    `quantize._gains`: two alternating fits of gains and energies; `energy` is the first.
    """
    place = tl.arange(0, ROWS)
    first = tl.maximum(energy, 1e-30)
    second = tl.zeros_like(energy)
    for start in range(0, 512, ROWS):
        token = start + place
        lost = _is_lost(token, outliers)
        x = _coefficients(work_ptr, token, comp, lost, RANK, RANK_PAD)
        gain = tl.sum(x * x / first[None, :], axis=1) / RANK
        second += tl.sum(x * x / tl.maximum(gain, 1e-30)[:, None], axis=0)
    second = tl.maximum(second / 512, 1e-30)
    weight = 0.0
    for start in range(0, 512, ROWS):
        token = start + place
        lost = _is_lost(token, outliers)
        x = _coefficients(work_ptr, token, comp, lost, RANK, RANK_PAD)
        gain = tl.sum(x * x / second[None, :], axis=1) / RANK
        code = tl.floor(tl.log2(tl.maximum(gain, 1e-30)) * 8.0 + 128.5)
        code = tl.minimum(tl.maximum(code, 1.0), 255.0)
        gain = tl.exp2((code - 128.0) * 0.0625)
        tl.store(gains_ptr + token, gain)
        if STORE:
            tl.store(codes_ptr + token, tl.where(lost > 0, 0, code.to(tl.int32)).to(tl.uint8))
        weight += tl.sum(gain * gain)
    tl.debug_barrier()
    return weight


@triton.jit
def _bits_of(comp, BANDS: tl.constexpr):
    bits = tl.zeros_like(comp)
    for b in tl.static_range(len(BANDS)):
        inside = (comp >= BANDS[b][0]) & (comp < BANDS[b][0] + BANDS[b][1])
        bits = tl.where(inside, BANDS[b][2], bits)
    return bits


@triton.jit
def _magnitude(x, SIZES: tl.constexpr, WHICH: tl.constexpr):
    """Index of the magnitude of `SIZES[WHICH]` that is nearest to `x`, and the magnitude."""
    index = tl.zeros_like(x)
    value = tl.zeros_like(x) + SIZES[WHICH][2]
    for i in tl.static_range(3, len(SIZES[WHICH])):
        past = x > (SIZES[WHICH][i - 1] + SIZES[WHICH][i]) * 0.5
        index += tl.where(past, 1.0, 0.0)
        value += tl.where(past, SIZES[WHICH][i] - SIZES[WHICH][i - 1], 0.0)
    return index, value


@triton.jit
def _levels(x, bits, SIZES: tl.constexpr):
    """Levels nearest to `x`, of the width that `bits` says."""
    size = tl.abs(x)
    _, value = _magnitude(size, SIZES, 0)
    for i in tl.static_range(1, len(SIZES)):
        _, other = _magnitude(size, SIZES, i)
        value = tl.where(bits == SIZES[i][0], other, value)
    return tl.where(x > 0, value, -value)


@triton.jit
def _stored(scale, inverse):
    """A scale as the page stores it, and what it is read as; `quantize._stored`."""
    stored = (scale / inverse).to(tl.bfloat16)
    return stored, stored.to(tl.float32) * inverse


@triton.jit
def _first_scale(energy, weight, bits, SIZES: tl.constexpr):
    """Of a normal variable: its deviation over that of the levels' unit."""
    unit = tl.zeros_like(energy) + SIZES[0][1]
    for i in tl.static_range(1, len(SIZES)):
        unit = tl.where(bits == SIZES[i][0], SIZES[i][1], unit)
    return tl.sqrt(energy * 512 / weight) / unit


@triton.jit
def _project_kernel(
    values_ptr, arena_ptr, exact_ptr, pages_ptr, first_ptr, cos_ptr, sin_ptr, projection_ptr,
    work_ptr, power_ptr, gains_ptr, errors_ptr, bad_ptr, plane_bytes, value_stride,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    SIDE: tl.constexpr, TURN: tl.constexpr, UNIT: tl.constexpr, RANK: tl.constexpr,
    BANDS: tl.constexpr, SIZES: tl.constexpr, HEAD_BYTES: tl.constexpr, MEAN_AT: tl.constexpr,
    SLOTS: tl.constexpr, DIM_PAD: tl.constexpr, RANK_PAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    block, layer, head = item // (LAYERS * HEADS), item // HEADS % LAYERS, item % HEADS
    values = values_ptr + layer.to(tl.int64) * value_stride + (head * 2 + SIDE) * (64 * DIM)
    record = arena_ptr + layer.to(tl.int64) * plane_bytes + head * HEAD_BYTES
    record += tl.load(pages_ptr + block).to(tl.int64) * 128
    exact, first = exact_ptr + block * 8, tl.load(first_ptr + block)
    work = work_ptr + item.to(tl.int64) * (512 * RANK_PAD)
    side_item = item * 2 + SIDE
    place, dim, comp = tl.arange(0, ROWS), tl.arange(0, DIM_PAD), tl.arange(0, RANK_PAD)

    mean = tl.zeros([DIM_PAD], tl.float32)
    top = tl.zeros([], tl.float32)
    bad = 0
    for start in range(0, 512, ROWS):
        x = _tokens_of(
            exact, values, cos_ptr, sin_ptr, first, start + place, dim, TURN, DIM, HALF, UNIT
        )
        size = tl.abs(x)
        bad += tl.sum(tl.where(size <= 3.3e38, 0, 1))
        top = tl.maximum(top, tl.max(size))
        mean += tl.sum(x * (1.0 / 512), axis=0)
    tl.store(bad_ptr + side_item, bad)
    half_mean = tl.minimum(tl.maximum(mean, -65504.0), 65504.0).to(tl.float16)
    mean = tl.zeros([DIM_PAD], tl.float32)
    if MEAN_AT >= 0:
        mean_at = (record + MEAN_AT).to(tl.pointer_type(tl.float16)) + dim
        tl.store(mean_at, half_mean, mask=dim < DIM)
        mean = half_mean.to(tl.float32)
    # a power of two, exact, brings values near 1: squares of any finite block fit
    exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(power_ptr + side_item, inverse)

    basis = projection_ptr + (layer * HEADS + head).to(tl.int64) * (DIM * RANK)
    for first_comp in tl.static_range(0, RANK_PAD, COLUMNS):  # what shared memory takes at once
        column = first_comp + tl.arange(0, COLUMNS)
        used = (dim < DIM)[:, None] & (column < RANK)[None, :]
        matrix = tl.load(basis + dim[:, None] * RANK + column[None, :], mask=used, other=0.0)
        matrix, matrix_rest = _halves(matrix)
        for start in range(0, 512, ROWS):
            token = start + place
            x = _tokens_of(
                exact, values, cos_ptr, sin_ptr, first, token, dim, TURN, DIM, HALF, UNIT
            )
            x, rest = _halves((x - mean[None, :]) * inverse)
            found = tl.dot(x, matrix_rest, tl.dot(rest, matrix))
            found = tl.dot(x, matrix, found)
            tl.store(work + token[:, None] * RANK_PAD + column[None, :], found.to(tl.bfloat16))
    tl.debug_barrier()

    if SLOTS > 0:
        none = tl.zeros([8], tl.int32) - 1
        energy = _energy(work, none, comp, RANK, RANK_PAD, ROWS)
        gains = gains_ptr + side_item.to(tl.int64) * 512
        weight = _gains(work, gains, arena_ptr, energy, none, comp, False, RANK, RANK_PAD, ROWS)
        bits = _bits_of(comp, BANDS)
        step = _stored(_first_scale(energy, weight, bits, SIZES), inverse)[1]
        apart = 1.0 / tl.where(step == 0, 1.0, step)
        errors = errors_ptr + side_item.to(tl.int64) * 512
        for start in range(0, 512, ROWS):
            token = start + place
            x = _coefficients(work, token, comp, token * 0, RANK, RANK_PAD)
            gain = tl.load(gains + token)[:, None]
            value = _levels(x / gain * apart[None, :], bits[None, :], SIZES)
            off = x - value * gain * step[None, :]
            tl.store(errors + token, tl.sum(off * off, axis=1))


@triton.jit
def _worst(errors_ptr, item, SLOTS: tl.constexpr):
    """The tokens `[8]`, unused places -1, whose coefficients of K and V come back worst."""
    token, slot = tl.arange(0, 512), tl.arange(0, 8)
    total = tl.zeros([512], tl.float32)
    for side in tl.static_range(2):
        error = tl.load(errors_ptr + (item * 2 + side).to(tl.int64) * 512 + token)
        total += error / tl.maximum(tl.sum(error) / 512, 1e-30)
    outliers = tl.zeros([8], tl.int32) - 1
    for j in tl.static_range(SLOTS):
        found = tl.argmax(total, axis=0).to(tl.int32)
        outliers = tl.where(slot == j, found, outliers)
        total = tl.where(token == found, -1.0, total)
    return outliers


@triton.jit
def _write_slots(
    record, pages_ptr, values_ptr, cos_ptr, sin_ptr, first, outliers,
    SIDE: tl.constexpr, TURN: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, SLOT_AT: tl.constexpr, INDEX_AT: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """The outlier tokens of a side, and with K their places, in ascending order."""
    dim = tl.arange(0, DIM_PAD)
    x = _tokens_of(
        pages_ptr, values_ptr, cos_ptr, sin_ptr, first, tl.maximum(outliers, 0), dim,
        TURN, DIM, HALF, UNIT,
    )  # fmt: skip
    x = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    other = tl.reshape(outliers, (1, 8))
    before = (other < tl.reshape(outliers, (8, 1))) & (other >= 0)
    rank = tl.sum(before.to(tl.int32), axis=1)
    used = outliers >= 0
    to = (record + SLOT_AT).to(tl.pointer_type(tl.float16)) + rank[:, None] * DIM + dim[None, :]
    tl.store(to, x, mask=used[:, None] & (dim < DIM)[None, :])
    if SIDE == 0:
        index = (record + INDEX_AT).to(tl.pointer_type(tl.int16)) + rank
        tl.store(index, outliers.to(tl.int16), mask=used)


@triton.jit
def _codes(
    work_ptr, gains_ptr, scale_ptr, codes_ptr, token, outliers, inverse,
    BANDS: tl.constexpr, B: tl.constexpr, SIZES: tl.constexpr, COUNT_PAD: tl.constexpr,
    RANK_PAD: tl.constexpr,
):  # fmt: skip
    """Codes int32 `[tokens, COUNT_PAD]` of a band, by the scales that the page holds."""
    part = tl.arange(0, COUNT_PAD)
    inside = part < BANDS[B][1]
    step = tl.load(scale_ptr + BANDS[B][0] + part, mask=inside, other=0.0).to(tl.float32) * inverse
    at = work_ptr + token[:, None] * RANK_PAD + (BANDS[B][0] + part)[None, :]
    kept = inside[None, :] & (_is_lost(token, outliers) == 0)[:, None]
    x = tl.load(at, mask=kept, other=0.0).to(tl.float32)
    x = x / tl.load(gains_ptr + token)[:, None] * (1.0 / tl.where(step == 0, 1.0, step))[None, :]
    entry = tl.where(x > 0, BANDS[B][2] * 16 + 8, BANDS[B][2] * 16)
    for i in tl.static_range(len(SIZES)):
        if SIZES[i][0] == BANDS[B][2]:
            entry += _magnitude(tl.abs(x), SIZES, i)[0].to(tl.int32)
    return tl.load(codes_ptr + entry)


@triton.jit
def _words(codes, shift, COUNT: tl.constexpr, WIDTH: tl.constexpr, PER: tl.constexpr):
    """`PER` codes of a row of `WIDTH` in an int32; bits do not meet, so a sum joins them."""
    parts = tl.reshape(codes << shift[None, :], (COUNT, WIDTH // PER, PER))
    return tl.sum(parts, axis=2)


@triton.jit
def _write_codes(
    record, codes, start, BANDS: tl.constexpr, B: tl.constexpr, BY_COMPONENT: tl.constexpr,
    COUNT_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pack codes int32 `[ROWS, COUNT_PAD]` of tokens from `start` on into a band's planes."""
    count: tl.constexpr = BANDS[B][1]
    bits: tl.constexpr = BANDS[B][2]
    low: tl.constexpr = 2 if bits == 3 else bits
    lines: tl.constexpr = COUNT_PAD if BY_COMPONENT else ROWS
    width: tl.constexpr = ROWS if BY_COMPONENT else COUNT_PAD
    end: tl.constexpr = ROWS if BY_COMPONENT else count
    line = tl.arange(0, lines)
    if BY_COMPONENT:
        codes = tl.trans(codes)
        row = (start // 128 * count + line) * 128 + start % 128  # in codes
        used = line < count
    else:
        row = (start + line) * count
        used = line >= 0
    element = tl.arange(0, width)
    per: tl.constexpr = 32 // low
    words = _words(codes & ((1 << low) - 1), element % per * low, lines, width, per)
    word = tl.arange(0, width // per)
    to = (record + BANDS[B][3]).to(tl.pointer_type(tl.int32))
    to += (row // per)[:, None] + word[None, :]
    tl.store(to, words, mask=used[:, None] & (word < end // per)[None, :])
    if bits == 3:
        bit = element % 32
        if BY_COMPONENT:
            bit = 4 * (bit % 16 // 2) + 2 * (bit // 16) + bit % 2
        thirds = _words(codes >> 2, bit, lines, width, 32)
        word = tl.arange(0, width // 32)
        to = (record + BANDS[B][4]).to(tl.pointer_type(tl.int32))
        to += (row // 32)[:, None] + word[None, :]
        tl.store(to, thirds, mask=used[:, None] & (word < end // 32)[None, :])


@triton.jit
def _quantize_kernel(
    values_ptr, arena_ptr, exact_ptr, pages_ptr, first_ptr, cos_ptr, sin_ptr, work_ptr, power_ptr,
    gains_ptr, errors_ptr, codes_ptr, plane_bytes, value_stride,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    SIDE: tl.constexpr, TURN: tl.constexpr, UNIT: tl.constexpr, RANK: tl.constexpr,
    BANDS: tl.constexpr, SIZES: tl.constexpr, BY_COMPONENT: tl.constexpr,
    HEAD_BYTES: tl.constexpr, SCALE_AT: tl.constexpr, GAIN_AT: tl.constexpr,
    SLOT_AT: tl.constexpr, INDEX_AT: tl.constexpr, SLOTS: tl.constexpr, COUNT_PADS: tl.constexpr,
    DIM_PAD: tl.constexpr, RANK_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
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
        outliers = _worst(errors_ptr, item, SLOTS)
        values = values_ptr + layer.to(tl.int64) * value_stride + (head * 2 + SIDE) * (64 * DIM)
        _write_slots(
            record, exact_ptr + block * 8, values, cos_ptr, sin_ptr, tl.load(first_ptr + block),
            outliers, SIDE, TURN, DIM, HALF, UNIT, SLOT_AT, INDEX_AT, DIM_PAD,
        )  # fmt: skip

    energy = _energy(work, outliers, comp, RANK, RANK_PAD, ROWS)
    weight = _gains(
        work, gains, record + GAIN_AT, energy, outliers, comp, True, RANK, RANK_PAD, ROWS
    )
    bits = _bits_of(comp, BANDS)
    scale = _first_scale(energy, weight, bits, SIZES)
    for _ in range(2):  # refits, as many as `quantize.REFITS`
        step = _stored(scale, inverse)[1]
        apart = 1.0 / tl.where(step == 0, 1.0, step)
        both = tl.zeros([RANK_PAD], tl.float32)
        own = tl.zeros([RANK_PAD], tl.float32)
        for start in range(0, 512, ROWS):
            token = start + place
            x = _coefficients(work, token, comp, _is_lost(token, outliers), RANK, RANK_PAD)
            gain = tl.load(gains + token)[:, None]
            value = _levels(x / gain * apart[None, :], bits[None, :], SIZES) * gain
            both += tl.sum(x * value, axis=0)
            own += tl.sum(value * value, axis=0)
        scale = both / tl.maximum(own, 1e-30)
    stored = _stored(scale, inverse)[0]
    scale_at = (record + SCALE_AT).to(tl.pointer_type(tl.bfloat16))
    tl.store(scale_at + comp, stored, mask=comp < RANK)
    tl.debug_barrier()

    for b in tl.static_range(len(BANDS)):
        for start in range(0, 512, ROWS):
            codes = _codes(
                work, gains, scale_at, codes_ptr, start + place, outliers, inverse,
                BANDS, b, SIZES, COUNT_PADS[b], RANK_PAD,
            )  # fmt: skip
            _write_codes(record, codes, start, BANDS, b, BY_COMPONENT, COUNT_PADS[b], ROWS)


@cache
def _code_table(device: torch.device) -> Tensor:
    """int32 `[80]`: at 16 bits + 8 (positive) + index of the magnitude, the code."""
    table = torch.zeros(80, dtype=torch.int32)
    for bits, levels in LEVELS["gaussian"].items():
        for code, level in enumerate(levels):
            index = sum(0 < x < abs(level) for x in levels)
            table[16 * bits + 8 * (level > 0) + index] = code
    return table.to(device)


def _sizes(side: SideLayout) -> tuple[tuple[float, ...], ...]:
    """`(bits, unit, ascending magnitudes ...)` of the widths that a side uses."""
    table = LEVELS["gaussian"]
    widths = sorted({band.bits for band in side.bands})
    return tuple(
        (bits, LEVEL_UNIT[bits], *(float(x) for x in sorted(table[bits]) if x > 0))
        for bits in widths
    )


def supports(layout: PageLayout) -> bool:
    """Whether this kernel makes pages of `layout`: what calibrated presets use."""
    sides = (layout.k, layout.v)
    return (
        layout.levels == "gaussian"
        and layout.rope in ("frame", "post")
        and layout.num_slots <= MAX_SLOTS
        and all(s.shared_basis and s.gain_offset >= 0 and s.scale_groups == 1 for s in sides)
        and all(b.bits < 8 and b.count % 16 == 0 for s in sides for b in s.bands)
        and all(b.bits != 3 or b.count % 32 == 0 for b in layout.k.bands)
    )


def seal(
    arena: Tensor,
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
) -> Tensor:
    """Encode blocks that lie in exact pages; their pages get what `codec.encode_pages` gives.

    Args:
        arena: uint8 `[L, plane_bytes]`, exact pages and spectral pages of L layers.
        exact: int32 `[B, 8]`, positions (128-byte units) of each block's exact pages.
        pages: int32 `[B]`, positions of the pages to write, the same in every layer.
        first: int32 `[B]`, position in its sequence of each block's first token.
        dtype: element type of exact pages.
        cos, sin: fp32 `[max_positions, rotary_dim / 2]`, the model's table.
        k_projection, v_projection: fp32 `[L, H, D, rank]`, what a token without its page's mean is
            multiplied with to give its coefficients.

    Returns:
        int32 `[B, L, H, 2]`: elements of K and of V that are NaN or Inf. Such pages are written
        and mean nothing.
    """
    num_layers, plane_bytes = arena.shape
    heads, dim = layout.num_kv_heads, layout.head_dim
    device = arena.device
    bad = torch.zeros(len(pages), num_layers, heads, 2, dtype=torch.int32, device=device)
    ranks = [padded(side.rank) for side in (layout.k, layout.v)]
    per_block = num_layers * heads
    at_once = max(1, WORKSPACE_BYTES // (per_block * sum(ranks) * 2 * BLOCK_TOKENS))
    values = arena.view(dtype)
    for start in range(0, len(pages), at_once):
        span = slice(start, start + at_once)
        items = len(pages[span]) * per_block
        power = torch.empty(items, 2, dtype=torch.float32, device=device)
        gains, errors = torch.empty(2, items, 2, BLOCK_TOKENS, device=device)
        places = (exact[span], pages[span], first[span], cos, sin)
        works = []
        for index, (side, rank, matrix) in enumerate(
            zip((layout.k, layout.v), ranks, (k_projection, v_projection), strict=True)
        ):
            work = torch.empty(items, BLOCK_TOKENS, rank, dtype=torch.bfloat16, device=device)
            works.append(work)
            _project_kernel[(items,)](
                values, arena, *places, matrix, work, power, gains, errors, bad[span],
                plane_bytes, values.shape[1],
                LAYERS=num_layers, HEADS=heads, DIM=dim, HALF=max(1, cos.shape[-1]), SIDE=index,
                TURN=index == 0 and layout.rope == "frame",
                UNIT=UNIT_BYTES // values.element_size(), RANK=side.rank,
                BANDS=band_tuples(side), SIZES=_sizes(side), HEAD_BYTES=layout.head_bytes,
                MEAN_AT=side.mean_offset, SLOTS=layout.num_slots, DIM_PAD=padded(dim),
                RANK_PAD=rank, ROWS=ROWS, COLUMNS=min(rank, 16384 // padded(dim)),
                num_warps=WARPS, num_stages=1,
            )  # fmt: skip
        for index, (side, rank) in enumerate(zip((layout.k, layout.v), ranks, strict=True)):
            _quantize_kernel[(items,)](
                values, arena, *places, works[index], power, gains, errors,
                _code_table(device), plane_bytes, values.shape[1],
                LAYERS=num_layers, HEADS=heads, DIM=dim, HALF=max(1, cos.shape[-1]), SIDE=index,
                TURN=index == 0 and layout.rope == "frame",
                UNIT=UNIT_BYTES // values.element_size(), RANK=side.rank,
                BANDS=band_tuples(side), SIZES=_sizes(side), BY_COMPONENT=side.by_component,
                HEAD_BYTES=layout.head_bytes, SCALE_AT=side.scale_offset,
                GAIN_AT=side.gain_offset, SLOT_AT=side.slot_offset, INDEX_AT=layout.index_offset,
                SLOTS=layout.num_slots,
                COUNT_PADS=tuple(padded(band.count) for band in side.bands),
                DIM_PAD=padded(dim), RANK_PAD=rank, ROWS=ROWS, num_warps=WARPS, num_stages=1,
            )  # fmt: skip
    return bad
