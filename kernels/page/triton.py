"""Triton functions that all page kernels share: they find and read the codes of a page.

A band is a constexpr tuple `(first, count, bits, offset, high_offset, basis_offset, basis_bits)`,
so that every `if` on it is decided while compiling.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from spectral_paged.kernels.page.layout import LEVELS, PageLayout, SideLayout

BandTuple = tuple[int, int, int, int, int, int, int]


def band_tuples(side: SideLayout) -> tuple[BandTuple, ...]:
    """The bands of a side as the constexpr tuples that kernels take."""
    return tuple(
        (b.first, b.count, b.bits, b.offset, b.high_offset, b.basis_offset, b.basis_bits)
        for b in side.bands
    )


@cache
def level_table(levels: str, device: torch.device) -> Tensor:
    """The levels of 2, 3 and 4 bits behind each other, fp32 `[28]`: from 0, 4 and 12 on."""
    values = [x for bits in (2, 3, 4) for x in LEVELS[levels][bits]]
    return torch.tensor(values, dtype=torch.float32, device=device)


def padded(n: int, low: int = 16) -> int:
    """The size of a tile that has room for `n`: a power of two, at least `low`."""
    return max(low, triton.next_power_of_2(n))


def check_layout(layout: PageLayout) -> None:
    """Refuse a layout that no decode kernel reads.

    Raises:
        ValueError: keys are stored before RoPE, or a component has more than one scale.
    """
    if layout.rope == "pre":
        raise ValueError(
            "rope='pre' keys have no GPU kernel: every key would be rotated at every step; use "
            "rope='frame', which turns the query once a frame"
        )
    check_scales(layout)


def check_scales(layout: PageLayout) -> None:
    """Refuse a layout whose scales cover fewer tokens than a page.

    Raises:
        ValueError: a component has more than one scale.
    """
    if layout.k.scale_groups != 1:
        raise ValueError("GPU kernels take scale_tokens=512 (one scale a component and page)")


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait for the kernel before, where `dependent_launch` let this one start early (`PDL`).

    A kernel must not read or write before this call.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def halves(x):
    """fp32 split into two fp16, as exact as fp32 in a sum of products of values near 1."""
    first = x.to(tl.float16)
    return first, (x - first.to(tl.float32)).to(tl.float16)


@triton.jit
def times_rows(x, rows):
    """The product of fp32 `x` `[n, rank]`, of any magnitude, and fp16 `rows` `[rank, m]`.

    Only `x` is split into two fp16, because `rows` are fp16 already.
    """
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)[:, None]
    first, rest = halves(x / largest)
    return tl.dot(rest, rows, tl.dot(first, rows)) * largest


@triton.jit
def capped(scores, cap):
    """Soft-capped scores, `cap tanh(scores / cap)`; both are in bits (base 2)."""
    twice = scores / cap * 2.8853900817779268  # exp(2 x) is 2 ** (2 x log2 e)
    return cap * (1.0 - 2.0 / (tl.exp2(twice) + 1.0))


@triton.jit
def _value(code, bits, levels_ptr, mask):
    """The levels, fp32 integers, of `code`s of `bits` bits (both tensors)."""
    start = tl.where(bits == 2, 0, tl.where(bits == 3, 4, 12))
    low = tl.load(levels_ptr + start + code, mask=mask & (bits < 8), other=0.0)
    return tl.where(bits == 8, code.to(tl.float32) - 128.0, low)


@triton.jit
def load_values(
    record,
    levels_ptr,
    tile,
    tokens,
    comps,
    BANDS: tl.constexpr,
    BY_COMPONENT: tl.constexpr,
    RANK: tl.constexpr,
):
    """The levels, fp32 integers, of the codes of a tile of 128 tokens.

    `tokens` and `comps` broadcast to the tile's shape, and `record` points at a head of a page. A
    byte is loaded for every code, so the same byte is loaded several times, from the GPU's cache.
    This is portable, not fast.
    """
    mask = (comps < RANK) & (tokens >= 0)
    bits = tl.zeros_like(comps)
    row = tl.zeros_like(comps)  # byte offset of the row that holds the code
    high_row = tl.zeros_like(comps)
    element = tokens if BY_COMPONENT else comps
    for b in tl.static_range(len(BANDS)):
        first, count = BANDS[b][0], BANDS[b][1]
        inside = (comps >= first) & (comps < first + count)
        plane = 2 if BANDS[b][2] == 3 else BANDS[b][2]
        if BY_COMPONENT:
            at = (tile * count + comps - first) * (128 * plane // 8)
            high_at = (tile * count + comps - first) * 16
        else:
            at = (tile * 128 + tokens) * (count * plane // 8)
            high_at = (tile * 128 + tokens) * (count // 8)
        bits = tl.where(inside, BANDS[b][2], bits)
        row = tl.where(inside, BANDS[b][3] + at, row)
        high_row = tl.where(inside, BANDS[b][4] + high_at, high_row)
        if not BY_COMPONENT:
            element = tl.where(inside, comps - first, element)
    plane_bits = tl.where(bits == 3, 2, bits)
    place = element * plane_bits
    byte = tl.load(record + row + place // 8, mask=mask, other=0).to(tl.int32)
    code = (byte >> (place % 8)) & ((1 << plane_bits) - 1)
    if BY_COMPONENT:
        inner = element % 32
        bit = element // 32 * 32 + 4 * (inner % 16 // 2) + 2 * (inner // 16) + inner % 2
    else:
        bit = element
    third_mask = mask & (bits == 3)
    third = tl.load(record + high_row + bit // 8, mask=third_mask, other=0).to(tl.int32)
    code += tl.where(bits == 3, ((third >> (bit % 8)) & 1) << 2, 0)
    return tl.where(mask, _value(code, bits, levels_ptr, mask), 0.0)


@triton.jit
def load_rows(
    record, levels_ptr, comps, dims, BANDS: tl.constexpr, RANK: tl.constexpr, DIM: tl.constexpr
):
    """The basis rows that lie in the page, as fp32 integers; `comps` and `dims` broadcast.

    INT4 rows have `gaussian` levels in every format, so `levels_ptr` must be that table.
    """
    mask = (comps < RANK) & (dims < DIM)
    bits = tl.zeros_like(comps)
    row = tl.zeros_like(comps)
    for b in tl.static_range(len(BANDS)):
        first, width = BANDS[b][0], BANDS[b][6]
        inside = (comps >= first) & (comps < first + BANDS[b][1])
        bits = tl.where(inside, width, bits)
        row = tl.where(inside, BANDS[b][5] + (comps - first) * (DIM * width // 8), row)
    place = dims * bits
    byte = tl.load(record + row + place // 8, mask=mask, other=0).to(tl.int32)
    code = (byte >> (place % 8)) & ((1 << bits) - 1)
    return tl.where(mask, _value(code, bits, levels_ptr, mask), 0.0)
