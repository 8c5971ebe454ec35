"""Codes of a seal in Triton, and their packing into the page in the order of `BandLayout`."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.page.layout import LEVELS
from spectral_paged.kernels.seal.triton.fit import is_lost, magnitude


@triton.jit
def band_codes(
    work_ptr,
    gains_ptr,
    scale_ptr,
    codes_ptr,
    token,
    outliers,
    inverse,
    BANDS: tl.constexpr,
    B: tl.constexpr,
    SIZES: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    RANK_PAD: tl.constexpr,
):
    """Codes int32 `[tokens, COUNT_PAD]` of a band, by the scales as the page stores them."""
    part = tl.arange(0, COUNT_PAD)
    inside = part < BANDS[B][1]
    step = tl.load(scale_ptr + BANDS[B][0] + part, mask=inside, other=0.0).to(tl.float32) * inverse
    at = work_ptr + token[:, None] * RANK_PAD + (BANDS[B][0] + part)[None, :]
    kept = inside[None, :] & (is_lost(token, outliers) == 0)[:, None]
    x = tl.load(at, mask=kept, other=0.0).to(tl.float32)
    x = x / tl.load(gains_ptr + token)[:, None] * (1.0 / tl.where(step == 0, 1.0, step))[None, :]
    entry = tl.where(x > 0, BANDS[B][2] * 16 + 8, BANDS[B][2] * 16)
    for i in tl.static_range(len(SIZES)):
        if SIZES[i][0] == BANDS[B][2]:
            entry += magnitude(tl.abs(x), SIZES, i)[0].to(tl.int32)
    return tl.load(codes_ptr + entry)


@triton.jit
def _words(codes, shift, COUNT: tl.constexpr, WIDTH: tl.constexpr, PER: tl.constexpr):
    """Words of `PER` codes each, from rows of `WIDTH`; a sum joins bits that do not overlap."""
    parts = tl.reshape(codes << shift[None, :], (COUNT, WIDTH // PER, PER))
    return tl.sum(parts, axis=2)


@triton.jit
def write_codes(
    record,
    codes,
    start,
    BANDS: tl.constexpr,
    B: tl.constexpr,
    BY_COMPONENT: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pack codes int32 `[ROWS, COUNT_PAD]` of tokens from `start` on into a band of the page."""
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


@cache
def code_table(device: torch.device) -> Tensor:
    """The code of each level, int32 `[80]`, at `16 * bits + 8 * positive + magnitude index`."""
    table = torch.zeros(80, dtype=torch.int32)
    for bits, levels in LEVELS["gaussian"].items():
        for code, level in enumerate(levels):
            index = sum(0 < x < abs(level) for x in levels)
            table[16 * bits + 8 * (level > 0) + index] = code
    return table.to(device)
