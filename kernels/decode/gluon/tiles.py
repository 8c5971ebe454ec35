"""Loading of tiles of 128 tokens of a page, and storing of partial results (Gluon)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spectral_paged.kernels.decode.gluon.operands import (
    load_digits,
    load_half_words,
    load_words,
    score_layout,
)


@gluon.jit
def v_band(
    record, tile, COUNT: gl.constexpr, BITS: gl.constexpr, AT: gl.constexpr, HIGH: gl.constexpr
):
    """Load the words of one band of V and, for 3 bits, the words of its third bits."""
    PLANE: gl.constexpr = 2 if BITS == 3 else BITS
    words = load_words(record + AT // 4 + tile * (COUNT * 4 * PLANE), COUNT, 4 * PLANE)
    if BITS == 3:  # noqa: SIM108 (decided while compiling)
        high = load_words(record + HIGH // 4 + tile * (COUNT * 4), COUNT, 4)
    else:
        high = words
    return words, high


@gluon.jit
def k_band(record, short, tile, BAND: gl.constexpr):
    """Load the words of one band of K; `record` points to int32, `short` to int16."""
    COUNT: gl.constexpr = BAND[1]
    BITS: gl.constexpr = BAND[2]
    if COUNT * BITS == 64:
        words = load_half_words(short + BAND[3] // 2 + tile * 512, 128)
    else:
        at = record + BAND[3] // 4 + tile * (COUNT * BITS * 4)
        words = load_words(at, 128, COUNT * BITS // 32)
    return words


@gluon.jit
def load_tile(
    plane_ptr,
    bytes_ptr,
    short_ptr,
    digits_ptr,
    affine_ptr,
    position,
    slot,
    tile,
    head,
    P: gl.constexpr,
    K_RANK: gl.constexpr,
    HEAD_BYTES: gl.constexpr,
    K_GAIN: gl.constexpr,
    V_GAIN: gl.constexpr,
    KA: gl.constexpr,
    KB: gl.constexpr,
    VA: gl.constexpr,
    VB: gl.constexpr,
):
    """Load into registers everything that attention to one tile reads."""
    unit = gl.maximum(position, 0).to(gl.int64)
    record = plane_ptr + (unit * 32 + head * (HEAD_BYTES // 4))
    short = short_ptr + (unit * 64 + head * (HEAD_BYTES // 2))
    ka = k_band(record, short, tile, KA)
    digits = digits_ptr + (slot * 4 + tile) * (2 * P * K_RANK // 4)
    da = load_digits(digits + KA[0] // 4, 2 * P, K_RANK, KA[1])
    if KB[1] > 0:
        kb = k_band(record, short, tile, KB)
        db = load_digits(digits + KB[0] // 4, 2 * P, K_RANK, KB[1])
    else:
        kb, db = ka, da
    va, va_high = v_band(record, tile, VA[1], VA[2], VA[3], VA[4])
    if VB[1] > 0:
        vb, vb_high = v_band(record, tile, VB[1], VB[2], VB[3], VB[4])
    else:
        vb, vb_high = va, va_high
    LAYOUT: gl.constexpr = score_layout(128, P)
    token = gl.arange(0, 128, layout=gl.SliceLayout(1, LAYOUT)) + tile * 128
    group = gl.arange(0, P, layout=gl.SliceLayout(0, LAYOUT))
    own = bytes_ptr + (unit * 128 + head * HEAD_BYTES)
    if K_GAIN >= 0:
        k_gain = gl.load(own + K_GAIN + token)
        v_gain = gl.load(own + V_GAIN + token)
    else:
        k_gain = gl.full([128], 128, gl.uint8, layout=gl.SliceLayout(1, LAYOUT))
        v_gain = k_gain
    affine = affine_ptr + (slot * 4 + tile) * (2 * P) + group
    return (
        ka,
        kb,
        da,
        db,
        va,
        va_high,
        vb,
        vb_high,
        k_gain,
        v_gain,
        gl.load(affine),
        gl.load(affine + P),
    )


@gluon.jit
def store(
    part,
    ranks_a,
    ranks_b,
    values,
    top,
    total,
    vectors_ptr,
    sums_ptr,
    P: gl.constexpr,
    DIM: gl.constexpr,
    RANK: gl.constexpr,
    VA: gl.constexpr,
    VB: gl.constexpr,
    VALUES: gl.constexpr,
):
    """Store the partial result of one part; see `Partials`."""
    SIZE: gl.constexpr = RANK + DIM if VALUES else RANK
    store_vectors(vectors_ptr + part * P * SIZE + VA[0], ranks_a, SIZE)
    if VB[1] > 0:
        store_vectors(vectors_ptr + part * P * SIZE + VB[0], ranks_b, SIZE)
    if VALUES:
        store_vectors(vectors_ptr + part * P * SIZE + RANK, values, SIZE)
    group = gl.arange(0, P, layout=top.type.layout)
    gl.store(sums_ptr + part * 2 * P + group, top)
    gl.store(sums_ptr + (part * 2 + 1) * P + group, total)


@gluon.jit
def store_vectors(to, x, SIZE: gl.constexpr):
    """Store `x` `[n, P]` at n consecutive places of P rows of `SIZE`."""
    place = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    group = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    gl.store(to + group[None, :] * SIZE + place[:, None], x)
