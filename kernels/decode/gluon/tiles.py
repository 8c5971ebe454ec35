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
from spectral_paged.kernels.decode.gluon.scores import gain_layout, load_gains


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
def load_k(
    plane_ptr,
    short_ptr,
    position,
    tile,
    head,
    K: gl.constexpr,
):
    """Load into registers the codes of K that one tile has, and the gains of both sides.

    `K` has the bytes of a head's record, the offsets of both gains, or -1, and two bands.
    """
    HEAD_BYTES: gl.constexpr = K[0]
    K_GAIN: gl.constexpr = K[1]
    V_GAIN: gl.constexpr = K[2]
    KA: gl.constexpr = K[3]
    KB: gl.constexpr = K[4]
    unit = gl.maximum(position, 0).to(gl.int64)
    record = plane_ptr + (unit * 32 + head * (HEAD_BYTES // 4))
    short = short_ptr + (unit * 64 + head * (HEAD_BYTES // 2))
    ka = k_band(record, short, tile, KA)
    kb = k_band(record, short, tile, KB) if KB[1] > 0 else ka
    if K_GAIN >= 0:
        k_gain = load_gains(record + K_GAIN // 4, tile)
        v_gain = load_gains(record + V_GAIN // 4, tile)
    else:
        k_gain = gl.zeros([32], gl.int32, layout=gl.SliceLayout(1, gain_layout()))
        v_gain = k_gain
    return ka, kb, k_gain, v_gain


@gluon.jit
def load_query(
    digits_ptr,
    affine_ptr,
    slot,
    tile,
    P: gl.constexpr,
    K_RANK: gl.constexpr,
    K: gl.constexpr,
):
    """Load what `Projected` has of one tile: digits by bands, and the two of its affine."""
    KA: gl.constexpr = K[3]
    KB: gl.constexpr = K[4]
    digits = digits_ptr + (slot * 4 + tile) * (2 * P * K_RANK // 4)
    da = load_digits(digits + KA[0] // 4, 2 * P, K_RANK, KA[1])
    db = load_digits(digits + KB[0] // 4, 2 * P, K_RANK, KB[1]) if KB[1] > 0 else da
    group = gl.arange(0, P, layout=gl.SliceLayout(0, score_layout(128, P)))
    affine = affine_ptr + (slot * 4 + tile) * (2 * P) + group
    return da, db, gl.load(affine), gl.load(affine + P)


@gluon.jit
def load_v(
    plane_ptr,
    position,
    tile,
    head,
    HEAD_BYTES: gl.constexpr,
    VA: gl.constexpr,
    VB: gl.constexpr,
):
    """Load into registers the codes of V that one tile has."""
    record = plane_ptr + (gl.maximum(position, 0).to(gl.int64) * 32 + head * (HEAD_BYTES // 4))
    va, va_high = v_band(record, tile, VA[1], VA[2], VA[3], VA[4])
    if VB[1] > 0:
        vb, vb_high = v_band(record, tile, VB[1], VB[2], VB[3], VB[4])
    else:
        vb, vb_high = va, va_high
    return va, va_high, vb, vb_high


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
