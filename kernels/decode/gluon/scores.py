"""From products of codes to weights: gains, scores, and the digits of weights (Gluon).

An accumulator's columns 2g and 2g + 1 are the two digits of query g in one thread. Gains are
exponents, in sixteenths of an octave; those of V multiply the weights, so they are added to scores
in bits, and are taken out again where weights are summed.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from spectral_paged.kernels.decode.gluon.operands import digit_steps, levels, mma, score_layout

# ---- layouts -----------------------------------------------------------------------------


@gluon.constexpr_function
def gain_layout():
    """`[32 words, 4 bytes]`: the gains of a tile; a thread has those of its four tokens."""
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], lanes, [[8, 0], [16, 0]], [], [32, 4])


@gluon.constexpr_function
def warp_layout(p):
    """`[P, 4 warps]`: what each warp found for each query; every thread has all of its query."""
    regs = [[0, 1], [0, 2]] + [[4 << i, 0] for i in range((p // 4).bit_length() - 1)]
    lanes = [[1, 0], [2, 0], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[0, 0], [0, 0]], [], [p, 4])


# ---- gains -------------------------------------------------------------------------------

# $4: bytes b -> fp32 2 ** 23 + b, one a byte
ASM_GAINS = gl.constexpr("""{
    .reg .b32 x;
    mov.b32 x, 0x4B000000;
    prmt.b32 $0, $4, x, 0x7440;
    prmt.b32 $1, $4, x, 0x7441;
    prmt.b32 $2, $4, x, 0x7442;
    prmt.b32 $3, $4, x, 0x7443;
}""")
NO_GAIN = gl.constexpr(8388608.0)  # of an outlier token's code, 0


@gluon.jit
def load_gains(base, tile):
    """Load the gain codes of a tile, int32 `[32]`; `base` points to int32."""
    word = gl.arange(0, 32, layout=gl.SliceLayout(1, gain_layout()))
    return gl.load(base + word + tile * 32)


@gluon.jit
def gain_codes(words, LAYOUT: gl.constexpr):
    """The gain codes of a tile as fp32 `[128]` in `LAYOUT`, with 2 ** 23 added to each."""
    W: gl.constexpr = gain_layout()
    wide = gl.expand_dims(words, 1) | gl.zeros([32, 4], gl.int32, layout=W)
    found = gl.inline_asm_elementwise(
        ASM_GAINS, "=r,=r,=r,=r,r,r,r,r", [wide], gl.int32, True, 4
    ).to(gl.float32, bitcast=True)
    return gl.convert_layout(gl.reshape(found, (128,)), LAYOUT, assert_trivial=True)


@gluon.jit
def octaves(codes):
    """The exponents, to base 2, of gains of `gain_codes`: a code is a sixteenth of an octave."""
    return codes * 0.0625 - 524296.0  # exact: 2 ** 23 / 16 + 128 / 16


# ---- scores ------------------------------------------------------------------------------


@gluon.jit
def merged(acc, P: gl.constexpr, LAYOUT: gl.constexpr):
    """The two digits of an accumulator int32 `[rows, 2 P]` joined: int32 `[rows, P]`, rows as they
    lie in memory; no data moves between threads."""
    ROWS: gl.constexpr = acc.shape[0]
    high, low = gl.split(gl.reshape(acc, (ROWS, P, 2)))
    x = gl.reshape((high << 7) + low, (ROWS // 64, 4, 2, 8, P))
    x = gl.reshape(gl.permute(x, (1, 3, 0, 2, 4)), (ROWS, P))
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def capped(scores, cap):
    """Soft-capped scores, `cap tanh(scores / cap)`; both are in bits (base 2)."""
    twice = scores / cap * 2.8853900817779268  # exp(2 x) is 2 ** (2 x log2 e)
    return cap * (1.0 - 2.0 / (gl.exp2(twice) + 1.0))


@gluon.jit
def products(codes, more, asked, rest, tables, A: gl.constexpr, B: gl.constexpr, P: gl.constexpr):
    """Multiply a tile's codes of K, one band or two, by the query's digits: fp32 `[128, P]`."""
    MMA: gl.constexpr = mma()
    acc = gl.zeros([128, 2 * P], gl.int32, layout=MMA)
    first = levels(codes, codes, tables, 128, A[2], MMA)
    second = digit_steps(asked, A[2] < 4, MMA)
    for i in gl.static_range(len(second)):  # a half word has one step, not two
        acc = mma_v2(first[i], second[i], acc)
    if B[1] > 0:
        first = levels(more, more, tables, 128, B[2], MMA)
        second = digit_steps(rest, B[2] < 4, MMA)
        for i in gl.static_range(len(second)):
            acc = mma_v2(first[i], second[i], acc)
    return merged(acc, P, score_layout(128, P)).to(gl.float32)


@gluon.jit
def tile_scores(
    found,
    k_gain,
    v_gain,
    unit,
    offset,
    cap,
    some,
    GAINS: gl.constexpr,
    SLOTS: gl.constexpr,
    CAPPED: gl.constexpr,
):
    """The scores of a tile in bits with the exponents of V's gains, from `products`.

    Nothing is visible of outlier tokens, which are attended to exactly, and of an entry without a
    page (`some` is False), whatever was found in its place.
    """
    TOKENS: gl.constexpr = gl.SliceLayout(1, found.type.layout)
    if GAINS:
        codes = gain_codes(k_gain, TOKENS)
        found = found * gl.exp2(octaves(codes))[:, None]
    unit = gl.where(some, unit, 0.0)
    found = found * unit[None, :] + gl.where(some, offset, float("-inf"))[None, :]
    if CAPPED:
        found = gl.where(some, capped(found, cap), float("-inf"))
    if SLOTS > 0:
        found = gl.where((codes == NO_GAIN)[:, None], float("-inf"), found)
    if GAINS:
        found = found + octaves(gain_codes(v_gain, TOKENS))[:, None]
    return found


@gluon.jit
def by_warp(x, MOST: gl.constexpr):
    """The sum or, with `MOST`, the largest of each warp's 32 tokens: `[128, P]` to `[P, 4]`."""
    x = gl.reshape(x, (4, 32, x.shape[1]))
    found = gl.max(x, axis=1) if MOST else gl.sum(x, axis=1)
    return gl.permute(found, (1, 0))


# ---- weights -------------------------------------------------------------------

# four integers of two digits of base 128 -> their high digits, their low ones
ASM_DIGITS = gl.constexpr("""{
    .reg .b32 p, q;
    prmt.b32 p, $2, $3, 0x5410;
    prmt.b32 q, $4, $5, 0x5410;
    prmt.b32 $1, p, q, 0x6420;
    and.b32 $1, $1, 0x7f7f7f7f;
    shr.u32 p, p, 7;
    shr.u32 q, q, 7;
    prmt.b32 $0, p, q, 0x6420;
}""")


@gluon.jit
def digits_of(x):
    """The two digits of base 128, int8, of fp32 up to 127 * 128, rounded to integers."""
    # adding 1.5 * 2 ** 23 rounds to an integer, which is in the low bits of the fp32
    whole = (x + 12582912.0).to(gl.int32, bitcast=True)
    return gl.inline_asm_elementwise(
        ASM_DIGITS, "=r,=r,r,r,r,r", [whole], (gl.int8, gl.int8), True, 4
    )
