"""The attend step of decode from pages with explicit layouts (Gluon), for Hopper and Ampere.

One program reads the pages of one item for one KV head, 128 tokens at a time. Every byte of codes
goes from global memory to the register of the thread whose tensor-core operand it becomes, and is
turned into INT8 levels there by byte permutes: no shared memory, no shuffle, no float.

```
scores   [128 tokens, 2 P] += codes of K [128 tokens, rank]    x digits of the query [rank, 2 P]
ranks    [rank, 2 P]       += codes of V [rank, 128 tokens]    x digits of weights   [128, 2 P]
```

Columns 2g and 2g + 1 are the high and low digit (base 128) of query g: two columns that one thread
holds, so that digits are put together in registers. An `m16n8k32` operand wants four consecutive
steps of the sum in a register; a thread takes a run of consecutive codes of its row, and the order
of the sum is whatever the bytes give: digits of the query are stored in that order, weights are
read from shared memory in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from spectral_paged.kernels.decode_plan import DecodePlan
from spectral_paged.kernels.layout import LEVELS, PageLayout, SideLayout
from spectral_paged.kernels.spectral_decode_triton import Partials, Projected
from spectral_paged.kernels.triton_page import band_tuples, padded

WARPS = 4
WEIGHT_UNIT = 16256.0  # 127 * 128: a weight of 1 in two digits of base 128


def _word(values: list[int]) -> int:
    """Four INT8 in a 32-bit word, the first lowest."""
    return int.from_bytes(bytes(x & 0xFF for x in values), "little")


def level_words() -> list[int]:
    """The level tables as words that a byte permute takes: of 4 bits (4 words), 3 (2) and 2 (1).

    A permute answers bit 3 of a selector with the sign of the byte it found, eight times. Of 4 bits
    codes n and n + 8 have levels of one sign, so of two permutes each gives zeros or ones where the
    other answers; the first table holds negative levels inverted, and an XOR puts both together.
    """
    table = LEVELS["gaussian"]
    first = [~x if x < 0 else x for x in table[4][:8]]
    parts = [first, table[4][8:], table[3], list(table[2]) + [0] * 4]
    words = [_word(list(part[i : i + 4])) for part in parts for i in (0, 4)]
    return [x - (1 << 32) if x >= 1 << 31 else x for x in words[:7]]


# $2: 8 codes of 4 bits -> $0: levels of codes 0..3, $1: of 4..7; tables in $6, $10, $14, $18.
ASM4 = gl.constexpr("""{
    .reg .b32 w, y, p, q;
    xor.b32 y, $2, 0x88888888;
    prmt.b32 p, $6, $10, $2;
    prmt.b32 q, $14, $18, y;
    xor.b32 $0, p, q;
    shr.u32 w, $2, 16;
    shr.u32 y, y, 16;
    prmt.b32 p, $6, $10, w;
    prmt.b32 q, $14, $18, y;
    xor.b32 $1, p, q;
}""")
# $4: 16 codes of 2 bits -> levels of codes 0 2 4 6, 1 3 5 7, 8 .. 14, 9 .. 15; table in $8.
ASM2 = gl.constexpr("""{
    .reg .b32 e, o;
    and.b32 e, $4, 0x33333333;
    shr.u32 o, $4, 2;
    and.b32 o, o, 0x33333333;
    prmt.b32 $0, $8, 0, e;
    prmt.b32 $1, $8, 0, o;
    shr.u32 e, e, 16;
    shr.u32 o, o, 16;
    prmt.b32 $2, $8, 0, e;
    prmt.b32 $3, $8, 0, o;
}""")


def _asm3() -> str:
    """$8, $12: 32 codes' low bits, $16: their third bits -> eight registers as of `ASM2`; tables
    in $20 and $24."""
    lines = [".reg .b32 h, s, t;"]
    steps = (  # word, shift of the word, shift of the third bits, outputs
        ("$8", 0, "shl.b32 h, $16, 2;", 0, 2),
        ("$8", 2, "shl.b32 h, $16, 1;", 1, 3),
        ("$12", 0, "mov.b32 h, $16;", 4, 6),
        ("$12", 2, "shr.u32 h, $16, 1;", 5, 7),
    )
    for word, shift, thirds, a, b in steps:
        lines += [
            thirds,
            "and.b32 h, h, 0x44444444;",
            f"shr.u32 s, {word}, {shift};" if shift else f"mov.b32 s, {word};",
            "lop3.b32 t, s, 0x33333333, h, 0xea;",  # (s & 0x33333333) | h
            f"prmt.b32 ${a}, $20, $24, t;",
            "shr.u32 t, t, 16;",
            f"prmt.b32 ${b}, $20, $24, t;",
        ]
    return "{" + "\n".join(lines) + "}"


ASM3 = gl.constexpr(_asm3())
ASM8 = gl.constexpr("xor.b32 $0, $1, 0x80808080;")
OUT1 = gl.constexpr("=r,r,r,r,r")
OUT2 = gl.constexpr(",".join(["=r"] * 2 + ["r"] * 20))
OUT4 = gl.constexpr(",".join(["=r"] * 4 + ["r"] * 8))
OUT8 = gl.constexpr(",".join(["=r"] * 8 + ["r"] * 20))


# ---- layouts -----------------------------------------------------------------------------


@gluon.constexpr_function
def _mma():
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def _row_regs(rows):
    """Rows that a thread holds beside its own: 8 on, and 64 on where there are 128."""
    return [[8], [64]] if rows == 128 else [[8]]


@gluon.constexpr_function
def _words_layout(rows, words):
    """`[rows, 4 threads, words]`: a thread's consecutive words of its rows."""
    regs = [[0, 0, 1 << i] for i in range(words.bit_length() - 1)]
    regs += [[r[0], 0, 0] for r in _row_regs(rows)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        regs, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, 4, words]
    )


@gluon.constexpr_function
def _score_layout(rows, p):
    """`[rows, P]`: what is left of an accumulator `[rows, 2 P]` when digits are put together."""
    regs = [[r[0], 0] for r in _row_regs(rows)]
    regs += [[0, 4 << i] for i in range((p // 4).bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[16, 0], [32, 0]], [], [rows, p])


@gluon.constexpr_function
def _column_layout(columns, run):
    """`[columns, 4 threads, run]`: the second operand, a thread's consecutive words or bytes."""
    regs = [[0, 0, 1 << i] for i in range(run.bit_length() - 1)]
    regs += [[8 << i, 0, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        regs, lanes, [[0, 0, 0], [0, 0, 0]], [], [columns, 4, run]
    )


# ---- codes to levels ---------------------------------------------------------------------


@gluon.constexpr_function
def _byte_layout(rows):
    """`[rows, 4 threads, 4 bytes]`: one register of INT8 a row."""
    regs = [[0, 0, 1], [0, 0, 2]] + [[r[0], 0, 0] for r in _row_regs(rows)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, 4, 4])


@gluon.jit
def _index(size: gl.constexpr, layout: gl.constexpr, dim: gl.constexpr):
    """`arange(size)` along `dim` of a 3-dimensional layout, broadcastable in it."""
    if dim == 0:
        x = gl.arange(0, size, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        x = gl.expand_dims(gl.expand_dims(x, 1), 2)
    elif dim == 1:
        x = gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
        x = gl.expand_dims(gl.expand_dims(x, 0), 2)
    else:
        x = gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
        x = gl.expand_dims(gl.expand_dims(x, 0), 1)
    return x


@gluon.jit
def _load_words(base, ROWS: gl.constexpr, ROW_WORDS: gl.constexpr):
    """int32 `[ROWS, 4, ROW_WORDS / 4]` of rows of `ROW_WORDS` words that follow each other."""
    WORDS: gl.constexpr = ROW_WORDS // 4
    LAYOUT: gl.constexpr = _words_layout(ROWS, WORDS)
    row = _index(ROWS, LAYOUT, 0)
    lane = _index(4, LAYOUT, 1)
    word = _index(WORDS, LAYOUT, 2)
    return gl.load(base + (row * ROW_WORDS + lane * WORDS + word))


@gluon.jit
def _by_bytes(word, ROWS: gl.constexpr):
    """A word `[ROWS, 4]` as the four bytes it becomes see it, `[ROWS, 4, 1]`; costs nothing."""
    LAYOUT: gl.constexpr = _byte_layout(ROWS)
    return gl.expand_dims(gl.convert_layout(word, gl.SliceLayout(2, LAYOUT)), 2)


@gluon.jit
def _widened(word, ROWS: gl.constexpr):
    zero = gl.zeros([ROWS, 4, 4], gl.int32, layout=_byte_layout(ROWS))
    return _by_bytes(word, ROWS) | zero


@gluon.jit
def _four(word, tables, ROWS: gl.constexpr):
    """Both registers of a word of 8 codes of 4 bits."""
    return gl.inline_asm_elementwise(
        ASM4, OUT2, [_widened(word, ROWS), tables[0], tables[1], tables[2], tables[3]],
        (gl.int8, gl.int8), True, 4,
    )  # fmt: skip


@gluon.jit
def _step(r0, r1, ROWS: gl.constexpr, MMA: gl.constexpr):
    """Registers `[ROWS, j, i]` of one step of 32 codes as a first operand `[ROWS, 32]`."""
    x = gl.join(r0, r1)  # [rows, j, i, h]
    x = gl.reshape(gl.permute(x, (0, 3, 1, 2)), (ROWS, 32))
    return gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 4))


@gluon.jit
def _levels(words, high, tables, ROWS: gl.constexpr, BITS: gl.constexpr, MMA: gl.constexpr):
    """First operands, one a step of 32 codes, of `_load_words`; `high` for 3 bits only."""
    NUM_WORDS: gl.constexpr = words.shape[2]
    if BITS == 8:
        gl.static_assert(NUM_WORDS == 2)
        w0, w1 = gl.split(words)
        r0 = gl.inline_asm_elementwise(ASM8, OUT1, [_widened(w0, ROWS)], gl.int8, True, 4)
        r1 = gl.inline_asm_elementwise(ASM8, OUT1, [_widened(w1, ROWS)], gl.int8, True, 4)
        return (_step(r0, r1, ROWS, MMA),)
    elif BITS == 4:
        if NUM_WORDS == 1:
            w0 = gl.reshape(words, (ROWS, 4))
            r0, r1 = _four(w0, tables, ROWS)
            return (_step(r0, r1, ROWS, MMA),)
        else:
            gl.static_assert(NUM_WORDS == 2)
            w0, w1 = gl.split(words)
            r0, r1 = _four(w0, tables, ROWS)
            r2, r3 = _four(w1, tables, ROWS)
            return (_step(r0, r1, ROWS, MMA), _step(r2, r3, ROWS, MMA))
    elif BITS == 2:
        gl.static_assert(NUM_WORDS == 1)
        w0 = gl.reshape(words, (ROWS, 4))
        r0, r1, r2, r3 = gl.inline_asm_elementwise(
            ASM2, OUT4, [_widened(w0, ROWS), tables[6]],
            (gl.int8, gl.int8, gl.int8, gl.int8), True, 4,
        )  # fmt: skip
        return (_step(r0, r1, ROWS, MMA), _step(r2, r3, ROWS, MMA))
    else:
        gl.static_assert(BITS == 3)
        w0, w1 = gl.split(words)
        h = gl.reshape(high, (ROWS, 4))
        types: gl.constexpr = (gl.int8,) * 8
        r = gl.inline_asm_elementwise(
            ASM3, OUT8,
            [_widened(w0, ROWS), _widened(w1, ROWS), _widened(h, ROWS), tables[4], tables[5]],
            types, True, 4,
        )  # fmt: skip
        return (
            _step(r[0], r[1], ROWS, MMA),
            _step(r[2], r[3], ROWS, MMA),
            _step(r[4], r[5], ROWS, MMA),
            _step(r[6], r[7], ROWS, MMA),
        )


# ---- second operands ---------------------------------------------------------------------


@gluon.jit
def _load_digits(base, COLUMNS: gl.constexpr, RANK: gl.constexpr, COUNT: gl.constexpr):
    """Digits of the query for one band, int32 `[COLUMNS, 4, COUNT / 16]`, four in a word."""
    WORDS: gl.constexpr = COUNT // 16
    LAYOUT: gl.constexpr = _column_layout(COLUMNS, WORDS)
    column = _index(COLUMNS, LAYOUT, 0)
    lane = _index(4, LAYOUT, 1)
    word = _index(WORDS, LAYOUT, 2)
    return gl.load(base + (column * (RANK // 4) + lane * WORDS + word))


@gluon.jit
def _second(x, MMA: gl.constexpr):
    return gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 4))


@gluon.jit
def _digit_bytes(word):
    """A word `[COLUMNS, 4]` as its bytes `[COLUMNS, 4, 4]`."""
    COLUMNS: gl.constexpr = word.shape[0]
    LAYOUT: gl.constexpr = _column_layout(COLUMNS, 4)
    zero = gl.zeros([COLUMNS, 4, 4], gl.int32, layout=LAYOUT)
    wide = gl.expand_dims(gl.convert_layout(word, gl.SliceLayout(2, LAYOUT)), 2) | zero
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", OUT1, [wide], gl.int8, True, 4)


@gluon.jit
def _digit_step(w0, w1, MMA: gl.constexpr):
    """The second operand `[32, COLUMNS]` of two words of every thread."""
    x = gl.join(_digit_bytes(w0), _digit_bytes(w1))  # [column, j, i, h]
    return _second(gl.reshape(gl.permute(x, (3, 1, 2, 0)), (32, w0.shape[0])), MMA)


@gluon.jit
def _digit_steps(x, MMA: gl.constexpr):
    """Second operands `[32, COLUMNS]` of `_load_digits`, one a step of 32 components."""
    COLUMNS: gl.constexpr = x.shape[0]
    if x.shape[2] == 2:
        w0, w1 = gl.split(x)
        return (_digit_step(w0, w1, MMA),)
    else:
        even, odd = gl.split(gl.reshape(x, (COLUMNS, 4, 2, 2)))
        w0, w2 = gl.split(even)
        w1, w3 = gl.split(odd)
        return (_digit_step(w0, w1, MMA), _digit_step(w2, w3, MMA))


@gluon.constexpr_function
def _weight_layout(columns):
    """`[columns, 128 tokens]`: a thread's 32 consecutive tokens of its columns."""
    regs = [[0, 1 << i] for i in range(5)]
    regs += [[8 << i, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[0, 0], [0, 0]], [], [columns, 128])


@gluon.jit
def _weight_steps(x, EVEN_FIRST: gl.constexpr, MMA: gl.constexpr):
    """Second operands `[32, COLUMNS]` of weights int8 `[COLUMNS, 128]`, one a step of 32 tokens.

    Tokens come as the codes of V leave a permute: see `digit_order`.
    """
    COLUMNS: gl.constexpr = x.shape[0]
    if EVEN_FIRST:
        x = gl.reshape(x, (COLUMNS, 4, 4, 4, 2))  # [column, j, step, i, h]
        x = gl.permute(x, (4, 1, 3, 0, 2))
    else:
        x = gl.reshape(x, (COLUMNS, 4, 4, 2, 4))  # [column, j, step, h, i]
        x = gl.permute(x, (3, 1, 4, 0, 2))
    even, odd = gl.split(gl.reshape(x, (32, COLUMNS, 2, 2)))
    s0, s2 = gl.split(even)
    s1, s3 = gl.split(odd)
    return (_second(s0, MMA), _second(s1, MMA), _second(s2, MMA), _second(s3, MMA))


@gluon.jit
def _merged(acc, P: gl.constexpr, LAYOUT: gl.constexpr):
    """Both digits of an accumulator int32 `[rows, 2 P]` put together: int32 `[rows, P]`."""
    ROWS: gl.constexpr = acc.shape[0]
    high, low = gl.split(gl.reshape(acc, (ROWS, P, 2)))
    return gl.convert_layout((high << 7) + low, LAYOUT)


# ---- one tile ----------------------------------------------------------------------------


@gluon.jit
def _v_band(record, tile, COUNT: gl.constexpr, BITS: gl.constexpr, AT: gl.constexpr, HIGH: gl.constexpr):
    """Words of one band of V and, for 3 bits, the words of its third bits."""
    PLANE: gl.constexpr = 2 if BITS == 3 else BITS
    words = _load_words(record + AT // 4 + tile * (COUNT * 4 * PLANE), COUNT, 4 * PLANE)
    if BITS == 3:
        high = _load_words(record + HIGH // 4 + tile * (COUNT * 4), COUNT, 4)
    else:
        high = words
    return words, high


@gluon.jit
def _load_tile(
    plane_ptr, bytes_ptr, digits_ptr, affine_ptr, position, slot, tile, head,
    P: gl.constexpr, K_RANK: gl.constexpr, HEAD_BYTES: gl.constexpr, K_GAIN: gl.constexpr,
    V_GAIN: gl.constexpr, KA: gl.constexpr, KB: gl.constexpr, VA: gl.constexpr, VB: gl.constexpr,
):  # fmt: skip
    """Everything that one tile reads, in registers."""
    record = plane_ptr + (gl.maximum(position, 0).to(gl.int64) * 32 + head * (HEAD_BYTES // 4))
    ka = _load_words(record + KA[3] // 4 + tile * (KA[1] * KA[2] * 4), 128, KA[1] * KA[2] // 32)
    digits = digits_ptr + (slot * 4 + tile) * (2 * P * K_RANK // 4)
    da = _load_digits(digits + KA[0] // 4, 2 * P, K_RANK, KA[1])
    if KB[1] > 0:
        kb = _load_words(record + KB[3] // 4 + tile * (KB[1] * KB[2] * 4), 128, KB[1] * KB[2] // 32)
        db = _load_digits(digits + KB[0] // 4, 2 * P, K_RANK, KB[1])
    else:
        kb, db = ka, da
    va, va_high = _v_band(record, tile, VA[1], VA[2], VA[3], VA[4])
    if VB[1] > 0:
        vb, vb_high = _v_band(record, tile, VB[1], VB[2], VB[3], VB[4])
    else:
        vb, vb_high = va, va_high
    LAYOUT: gl.constexpr = _score_layout(128, P)
    token = gl.arange(0, 128, layout=gl.SliceLayout(1, LAYOUT)) + tile * 128
    group = gl.arange(0, P, layout=gl.SliceLayout(0, LAYOUT))
    own = bytes_ptr + (gl.maximum(position, 0).to(gl.int64) * 128 + head * HEAD_BYTES)
    if K_GAIN >= 0:
        k_gain = gl.load(own + K_GAIN + token)
        v_gain = gl.load(own + V_GAIN + token)
    else:
        k_gain = gl.full([128], 128, gl.uint8, layout=gl.SliceLayout(1, LAYOUT))
        v_gain = k_gain
    affine = affine_ptr + (slot * 4 + tile) * (2 * P) + group
    return ka, kb, da, db, va, va_high, vb, vb_high, k_gain, v_gain, gl.load(affine), gl.load(affine + P)


@gluon.jit
def _attend_kernel(
    plane_ptr, bytes_ptr, bf16_ptr, half_ptr, table_ptr, item_seq_ptr, item_start_ptr,
    first_entry_ptr, chunk_ptr, digits_ptr, affine_ptr, slots_ptr, ranks_ptr, values_ptr, sums_ptr,
    num_seqs, table_width, t0, t1, t2, t3, t4, t5, t6,
    HEADS: gl.constexpr, P: gl.constexpr, DIM: gl.constexpr, K_RANK: gl.constexpr,
    V_RANK: gl.constexpr, KA: gl.constexpr, KB: gl.constexpr, VA: gl.constexpr, VB: gl.constexpr,
    HEAD_BYTES: gl.constexpr, K_GAIN: gl.constexpr, V_GAIN: gl.constexpr, V_SCALE: gl.constexpr,
    V_MEAN: gl.constexpr, V_SLOT: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    item, head = gl.program_id(0), gl.program_id(1)
    seq = gl.load(item_seq_ptr + item)
    if seq < num_seqs:
        MMA: gl.constexpr = _mma()
        S: gl.constexpr = _score_layout(128, P)
        NA: gl.constexpr = VA[1]
        NB: gl.constexpr = VB[1] if VB[1] > 0 else VA[1]
        A: gl.constexpr = _score_layout(NA, P)
        B: gl.constexpr = _score_layout(NB, P)
        D: gl.constexpr = _score_layout(DIM, P)
        UNIT: gl.constexpr = 16256.0
        start = gl.load(item_start_ptr + item)
        first_entry = gl.load(first_entry_ptr + seq)
        count = gl.load(first_entry_ptr + seq + 1) - first_entry
        end = gl.minimum(start + gl.load(chunk_ptr), count)
        row = table_ptr + seq * table_width
        tables = (t0, t1, t2, t3, t4, t5, t6)
        smem = gl.allocate_shared_memory(
            gl.int8, [2 * P, 128], gl.SwizzledSharedLayout(16, 1, 8, order=[1, 0])
        )
        group = gl.arange(0, P, layout=gl.SliceLayout(0, S))
        comp_a = gl.arange(0, NA, layout=gl.SliceLayout(1, A))
        comp_b = gl.arange(0, NB, layout=gl.SliceLayout(1, B))
        dim = gl.arange(0, DIM, layout=gl.SliceLayout(1, D))
        top = gl.full([P], float("-inf"), gl.float32, layout=gl.SliceLayout(0, S))
        total = gl.zeros([P], gl.float32, layout=gl.SliceLayout(0, S))
        page_sum = gl.zeros([128, P], gl.float32, layout=S)
        ranks_a = gl.zeros([NA, P], gl.float32, layout=A)
        ranks_b = gl.zeros([NB, P], gl.float32, layout=B)
        values = gl.zeros([DIM, P], gl.float32, layout=D)

        position = gl.load(row + start)
        following = gl.load(row + gl.minimum(start + 1, end - 1))
        slot = (first_entry + start).to(gl.int64) * HEADS + head
        ahead = _load_tile(
            plane_ptr, bytes_ptr, digits_ptr, affine_ptr, position, slot, 0, head,
            P, K_RANK, HEAD_BYTES, K_GAIN, V_GAIN, KA, KB, VA, VB,
        )  # fmt: skip
        for step in range((end - start) * 4):
            ka, kb, da, db, va, va_high, vb, vb_high, k_gain, v_gain, unit, offset = ahead
            tile = step % 4
            entry = start + step // 4
            here = position
            slot = (first_entry + entry).to(gl.int64) * HEADS + head
            # the next tile's bytes are on their way while this one is computed
            next_entry = gl.minimum(start + (step + 1) // 4, end - 1)
            position = gl.where(tile == 3, following, position)
            following = gl.load(row + gl.minimum(next_entry + 1, end - 1))
            ahead = _load_tile(
                plane_ptr, bytes_ptr, digits_ptr, affine_ptr, position,
                (first_entry + next_entry).to(gl.int64) * HEADS + head, (step + 1) % 4, head,
                P, K_RANK, HEAD_BYTES, K_GAIN, V_GAIN, KA, KB, VA, VB,
            )  # fmt: skip

            acc = gl.zeros([128, 2 * P], gl.int32, layout=MMA)
            first = _levels(ka, ka, tables, 128, KA[2], MMA)
            second = _digit_steps(da, MMA)
            for i in gl.static_range(len(first)):
                acc = mma_v2(first[i], second[i], acc)
            if KB[1] > 0:
                first = _levels(kb, kb, tables, 128, KB[2], MMA)
                second = _digit_steps(db, MMA)
                for i in gl.static_range(len(first)):
                    acc = mma_v2(first[i], second[i], acc)
            scores = _merged(acc, P, S).to(gl.float32)
            if K_GAIN >= 0:
                gain = gl.exp2((k_gain.to(gl.float32) - 128.0) * 0.0625)
                scores = scores * gain[:, None]
            scores = scores * unit[None, :] + offset[None, :]
            if SLOTS > 0:
                scores = gl.where((k_gain == 0)[:, None], float("-inf"), scores)
            if V_GAIN >= 0:
                octaves = (v_gain.to(gl.float32) - 128.0) * 0.0625
                scores = scores + octaves[:, None]
            scores = gl.where(here >= 0, scores, float("-inf"))
            new_top = gl.maximum(top, gl.max(scores, axis=0))
            safe = gl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = gl.exp2(top - safe)
            top = new_top
            weights = gl.exp2(scores - safe[None, :])  # gains of V are in them
            plain = weights
            if V_GAIN >= 0:
                plain = weights * gl.exp2(-octaves)[:, None]
            page_sum = page_sum * shrink[None, :] + plain
            total = total * shrink
            whole = (weights * UNIT + 0.5).to(gl.int32)
            digits = gl.join((whole >> 7).to(gl.int8), (whole & 127).to(gl.int8))
            smem.store(gl.permute(gl.reshape(digits, (128, 2 * P)), (1, 0)))
            w = smem.load(_weight_layout(2 * P))

            second = _weight_steps(w, VA[2] < 4, MMA)
            acc = gl.zeros([NA, 2 * P], gl.int32, layout=MMA)
            first = _levels(va, va_high, tables, VA[1], VA[2], MMA)
            for i in gl.static_range(4):
                acc = mma_v2(first[i], second[i], acc)
            record = bf16_ptr + (gl.maximum(here, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2))
            scale = gl.load(record + V_SCALE // 2 + VA[0] + comp_a).to(gl.float32) * (1.0 / UNIT)
            scale = gl.where(here >= 0, scale, 0.0)
            less = gl.convert_layout(shrink, gl.SliceLayout(0, A))
            found = _merged(acc, P, A).to(gl.float32)
            ranks_a = ranks_a * less[None, :] + found * scale[:, None]
            if VB[1] > 0:
                second = _weight_steps(w, VB[2] < 4, MMA)
                acc = gl.zeros([NB, 2 * P], gl.int32, layout=MMA)
                first = _levels(vb, vb_high, tables, VB[1], VB[2], MMA)
                for i in gl.static_range(4):
                    acc = mma_v2(first[i], second[i], acc)
                scale = gl.load(record + V_SCALE // 2 + VB[0] + comp_b).to(gl.float32) * (1.0 / UNIT)
                scale = gl.where(here >= 0, scale, 0.0)
                less = gl.convert_layout(shrink, gl.SliceLayout(0, B))
                found = _merged(acc, P, B).to(gl.float32)
                ranks_b = ranks_b * less[None, :] + found * scale[:, None]
            values = values * gl.convert_layout(shrink, gl.SliceLayout(0, D))[None, :]

            if tile == 3:
                summed = gl.sum(page_sum, axis=0)
                page_sum = gl.zeros([128, P], gl.float32, layout=S)
                total = total + summed
                halves = half_ptr + (gl.maximum(here, 0).to(gl.int64) * 64 + head * (HEAD_BYTES // 2))
                if V_MEAN >= 0:
                    mean = gl.load(halves + V_MEAN // 2 + dim).to(gl.float32)
                    mean = gl.where(here >= 0, mean, 0.0)
                    values += mean[:, None] * gl.convert_layout(summed, gl.SliceLayout(0, D))[None, :]
                for j in gl.static_range(SLOTS):
                    exact = gl.load(slots_ptr + (slot * SLOTS + j) * P + group)
                    exact = gl.where(here >= 0, exact, float("-inf"))
                    value = gl.load(halves + V_SLOT // 2 + j * DIM + dim).to(gl.float32)
                    value = gl.where(here >= 0, value, 0.0)
                    new_top = gl.maximum(top, exact)
                    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
                    shrink = gl.exp2(top - safe)
                    weight = gl.exp2(exact - safe)
                    top = new_top
                    total = total * shrink + weight
                    ranks_a = ranks_a * gl.convert_layout(shrink, gl.SliceLayout(0, A))[None, :]
                    ranks_b = ranks_b * gl.convert_layout(shrink, gl.SliceLayout(0, B))[None, :]
                    values = values * gl.convert_layout(shrink, gl.SliceLayout(0, D))[None, :]
                    values += value[:, None] * gl.convert_layout(weight, gl.SliceLayout(0, D))[None, :]
        out = item.to(gl.int64) * HEADS + head
        group_a = gl.arange(0, P, layout=gl.SliceLayout(0, A))
        gl.store(ranks_ptr + (out * P + group_a)[None, :] * V_RANK + (VA[0] + comp_a)[:, None], ranks_a)
        if VB[1] > 0:
            group_b = gl.arange(0, P, layout=gl.SliceLayout(0, B))
            gl.store(
                ranks_ptr + (out * P + group_b)[None, :] * V_RANK + (VB[0] + comp_b)[:, None], ranks_b
            )
        group_d = gl.arange(0, P, layout=gl.SliceLayout(0, D))
        gl.store(values_ptr + (out * P + group_d)[None, :] * DIM + dim[:, None], values)
        gl.store(sums_ptr + out * 2 * P + group, top)
        gl.store(sums_ptr + (out * 2 + 1) * P + group, total)


# ---- the op ------------------------------------------------------------------------------

NO_BAND = (0, 0, 8, 0, 0, 0, 0)


def supports(layout: PageLayout, group: int) -> bool:
    """Whether this implementation reads pages of `layout`; the portable one reads the others."""
    k, v = layout.k, layout.v
    return (
        layout.head_dim in (64, 128)
        and group <= 16
        and layout.levels == "gaussian"
        and (layout.num_slots == 0 or k.gain_offset >= 0)
        and (k.gain_offset >= 0) == (v.gain_offset >= 0)
        and len(k.bands) <= 2
        and len(v.bands) <= 2
        and all((b.bits, b.count) in {(8, 32), (4, 32), (4, 64), (2, 64)} for b in k.bands)
        and all(b.bits in (3,) and b.count in (64, 128) for b in v.bands)
    )


def attend_pages(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    projected: Projected,
    *,
    layout: PageLayout,
    plan: DecodePlan,
) -> Partials:
    """`spectral_decode_triton.attend_pages` for layouts that `supports` names."""
    heads, dim = layout.num_kv_heads, layout.head_dim
    width = padded(q.shape[1] // heads, 4)
    k, v = layout.k, layout.v
    items, device = plan.num_items, q.device
    partials = Partials(
        *(
            torch.empty(items, heads, *shape, dtype=torch.float32, device=device)
            for shape in ((width, v.rank), (width, dim), (2, width))
        )
    )
    bands = [*band_tuples(k), NO_BAND][:2] + [*band_tuples(v), NO_BAND][:2]
    _attend_kernel[(items, heads)](
        plane.view(torch.int32), plane, plane.view(torch.bfloat16), plane.view(torch.float16),
        table, plan.item_seq, plan.item_start, plan.first_entry, plan.chunk, projected.digits.view(torch.int32),
        projected.affine, projected.slots, partials.ranks, partials.values, partials.sums,
        q.shape[0], table.stride(0), *level_words(),
        HEADS=heads, P=width, DIM=dim, K_RANK=k.rank, V_RANK=v.rank,
        KA=bands[0], KB=bands[1], VA=bands[2], VB=bands[3], HEAD_BYTES=layout.head_bytes,
        K_GAIN=k.gain_offset, V_GAIN=v.gain_offset, V_SCALE=v.scale_offset, V_MEAN=v.mean_offset,
        V_SLOT=v.slot_offset, SLOTS=layout.num_slots, num_warps=WARPS,
    )  # fmt: skip
    return partials
