"""Fits of a seal in Triton: energies, gains and levels of the coefficients in a workspace.

They do for one side of one head what `spectral_paged.pages.quantize` does for a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_paged.kernels.page.layout import LEVEL_UNIT, LEVELS, SideLayout


@triton.jit
def coefficients(work_ptr, token, comp, lost, RANK: tl.constexpr, RANK_PAD: tl.constexpr):
    """Rows of the workspace in fp32; those of outlier tokens (`lost`) are zero."""
    at = work_ptr + token[:, None] * RANK_PAD + comp[None, :]
    kept = (comp < RANK)[None, :] & (lost == 0)[:, None]
    return tl.load(at, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def is_lost(token, outliers):
    """1 for each token that is one of `outliers`, else 0."""
    return tl.sum((token[:, None] == outliers[None, :]).to(tl.int32), axis=1)


@triton.jit
def energies(
    work_ptr, outliers, comp, RANK: tl.constexpr, RANK_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """The mean square of every component over the block's 512 tokens."""
    energy = tl.zeros([RANK_PAD], tl.float32)
    for start in range(0, 512, ROWS):
        token = start + tl.arange(0, ROWS)
        x = coefficients(work_ptr, token, comp, is_lost(token, outliers), RANK, RANK_PAD)
        energy += tl.sum(x * x, axis=0)
    return energy / 512


@triton.jit
def fit_gains(
    work_ptr,
    gains_ptr,
    codes_ptr,
    energy,
    outliers,
    comp,
    STORE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Fit the gains of all tokens, store them and their codes, and return the sum of their squares.

    As in `quantize._gains`, gains and energies are fitted twice in turn; `energy` is the first.
    Gains go to `gains_ptr`, and with `STORE` their codes go to the page at `codes_ptr`.
    """
    place = tl.arange(0, ROWS)
    first = tl.maximum(energy, 1e-30)
    second = tl.zeros_like(energy)
    for start in range(0, 512, ROWS):
        token = start + place
        lost = is_lost(token, outliers)
        x = coefficients(work_ptr, token, comp, lost, RANK, RANK_PAD)
        gain = tl.sum(x * x / first[None, :], axis=1) / RANK
        second += tl.sum(x * x / tl.maximum(gain, 1e-30)[:, None], axis=0)
    second = tl.maximum(second / 512, 1e-30)
    weight = 0.0
    for start in range(0, 512, ROWS):
        token = start + place
        lost = is_lost(token, outliers)
        x = coefficients(work_ptr, token, comp, lost, RANK, RANK_PAD)
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
def bits_of(comp, BANDS: tl.constexpr):
    bits = tl.zeros_like(comp)
    for b in tl.static_range(len(BANDS)):
        inside = (comp >= BANDS[b][0]) & (comp < BANDS[b][0] + BANDS[b][1])
        bits = tl.where(inside, BANDS[b][2], bits)
    return bits


@triton.jit
def magnitude(x, SIZES: tl.constexpr, WHICH: tl.constexpr):
    """The magnitude of `SIZES[WHICH]` that is nearest to `x`: its index, and its value."""
    index = tl.zeros_like(x)
    value = tl.zeros_like(x) + SIZES[WHICH][2]
    for i in tl.static_range(3, len(SIZES[WHICH])):
        past = x > (SIZES[WHICH][i - 1] + SIZES[WHICH][i]) * 0.5
        index += tl.where(past, 1.0, 0.0)
        value += tl.where(past, SIZES[WHICH][i] - SIZES[WHICH][i - 1], 0.0)
    return index, value


@triton.jit
def nearest_levels(x, bits, SIZES: tl.constexpr):
    """The levels nearest to `x` among those of `bits` bits."""
    size = tl.abs(x)
    _, value = magnitude(size, SIZES, 0)
    for i in tl.static_range(1, len(SIZES)):
        _, other = magnitude(size, SIZES, i)
        value = tl.where(bits == SIZES[i][0], other, value)
    return tl.where(x > 0, value, -value)


@triton.jit
def stored_scale(scale, inverse):
    """A scale as the page stores it, and its rounded value; see `quantize._stored`."""
    stored = (scale / inverse).to(tl.bfloat16)
    return stored, stored.to(tl.float32) * inverse


@triton.jit
def first_scale(energy, weight, bits, SIZES: tl.constexpr):
    """The first scale, for normal coefficients: their deviation over that of the levels."""
    unit = tl.zeros_like(energy) + SIZES[0][1]
    for i in tl.static_range(1, len(SIZES)):
        unit = tl.where(bits == SIZES[i][0], SIZES[i][1], unit)
    return tl.sqrt(energy * 512 / weight) / unit


def level_sizes(side: SideLayout) -> tuple[tuple[float, ...], ...]:
    """The levels of a side's widths: `(bits, LEVEL_UNIT, ascending magnitudes ...)` for each."""
    table = LEVELS["gaussian"]
    widths = sorted({band.bits for band in side.bands})
    return tuple(
        (bits, LEVEL_UNIT[bits], *(float(x) for x in sorted(table[bits]) if x > 0))
        for bits in widths
    )
