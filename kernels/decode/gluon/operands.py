"""Codes, digits and weights as tensor-core operands in registers (Gluon).

An `m16n8k32` operand takes four consecutive terms of the sum in a register of INT8. A thread loads
a run of consecutive codes of its row, so the order of the bytes gives the order of the sum. Digits
of the query and weights, the small operands, are put into that order. In the comments j is one of
the four threads that share a row, i a byte of a register, and h one of a step's two registers.
"""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from spectral_paged.kernels.page.layout import LEVELS


def _word(values: list[int]) -> int:
    """Four INT8 in a 32-bit word, the first lowest."""
    return int.from_bytes(bytes(x & 0xFF for x in values), "little")


@cache  # every layer's launch takes them
def level_words() -> tuple[int, ...]:
    """The level tables as words that a byte permute takes: of 4 bits (4 words), 3 (2) and 2 (2).

    Where bit 3 of a selector is set, a permute gives eight copies of the sign of the byte it found.
    Codes n and n + 8 of 4 bits have levels of the same sign, so each of two permutes gives zeros or
    ones where the other finds the level. The first table has negative levels inverted, so that an
    XOR joins both.
    """
    table = LEVELS["gaussian"]
    first = [~x if x < 0 else x for x in table[4][:8]]
    parts = [first, table[4][8:], table[3], list(table[2]) + [0] * 4]
    words = [_word(list(part[i : i + 4])) for part in parts for i in (0, 4)]
    return tuple(x - (1 << 32) if x >= 1 << 31 else x for x in words)


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
# $4: 16 codes of 2 bits -> levels of codes 0 2 4 6, 1 3 5 7, 8 .. 14, 9 .. 15; table in $8 and $12,
# of which the second is zeros: a pair of constants is loaded once, a lone one is copied every time.
ASM2 = gl.constexpr("""{
    .reg .b32 e, o;
    and.b32 e, $4, 0x33333333;
    shr.u32 o, $4, 2;
    and.b32 o, o, 0x33333333;
    prmt.b32 $0, $8, $12, e;
    prmt.b32 $1, $8, $12, o;
    shr.u32 e, e, 16;
    shr.u32 o, o, 16;
    prmt.b32 $2, $8, $12, e;
    prmt.b32 $3, $8, $12, o;
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
OUT4 = gl.constexpr(",".join(["=r"] * 4 + ["r"] * 12))
OUT8 = gl.constexpr(",".join(["=r"] * 8 + ["r"] * 20))


# ---- layouts -----------------------------------------------------------------------------


@gluon.jit
def after_previous(PDL: gl.constexpr):
    """`page.triton.after_previous` in Gluon."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@gluon.constexpr_function
def mma():
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def _row_regs(rows):
    """Offsets of a thread's other rows: 8, and 64 where there are 128 rows."""
    return [[8], [64]] if rows == 128 else [[8]]


@gluon.constexpr_function
def _words_layout(rows, words):
    """`[rows, 4 threads, words]`: a thread has consecutive words of its rows."""
    regs = [[0, 0, 1 << i] for i in range(words.bit_length() - 1)]
    regs += [[r[0], 0, 0] for r in _row_regs(rows)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, 4, words])


@gluon.constexpr_function
def score_layout(rows, p):
    """`[rows, P]`: an accumulator `[rows, 2 P]` with its digits joined, rows as they lie in memory.

    A thread has consecutive rows; see `row_pointers`.
    """
    run = rows // 32
    regs = [[1 << i, 0] for i in range(run.bit_length() - 1)]
    regs += [[0, 4 << i] for i in range((p // 4).bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [run, 0], [2 * run, 0], [4 * run, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[8 * run, 0], [16 * run, 0]], [], [rows, p])


@gluon.constexpr_function
def _column_layout(columns, run):
    """`[columns, 4 threads, run]`: the second operand; a thread has consecutive words or bytes."""
    regs = [[0, 0, 1 << i] for i in range(run.bit_length() - 1)]
    regs += [[8 << i, 0, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[0, 0, 0], [0, 0, 0]], [], [columns, 4, run])


# ---- codes to levels ---------------------------------------------------------------------


@gluon.constexpr_function
def _byte_layout(rows):
    """`[rows, 4 threads, 4 bytes]`: one register of INT8 a row."""
    regs = [[0, 0, 1], [0, 0, 2]] + [[r[0], 0, 0] for r in _row_regs(rows)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, 4, 4])


@gluon.jit
def index_of(size: gl.constexpr, layout: gl.constexpr, dim: gl.constexpr):
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
def row_pointers(base, row, ROWS: gl.constexpr, STRIDE: gl.constexpr):
    """Pointers to rows of `STRIDE` elements, for the rows of an operand of `ROWS` rows.

    The rows 8, 64 and 72 after one are in the same thread. Rows 1, 2 and 3 after it in memory take
    their places, so that what belongs to a row lies side by side: gains, weights, scales, results.
    The part that a thread's rows share is added first: the others are offsets of an instruction.
    """
    RUN: gl.constexpr = ROWS // 32
    first = ((row & 7) + (row >> 1 & 24)) * (RUN * STRIDE)
    own = ((row >> 3 & 1) + (row >> 6) * 2) * STRIDE
    return (base + first) + own


@gluon.jit
def load_words(base, ROWS: gl.constexpr, ROW_WORDS: gl.constexpr):
    """Load rows of `ROW_WORDS` words that follow each other, int32 `[ROWS, 4, ROW_WORDS / 4]`."""
    WORDS: gl.constexpr = ROW_WORDS // 4
    LAYOUT: gl.constexpr = _words_layout(ROWS, WORDS)
    row = index_of(ROWS, LAYOUT, 0)
    lane = index_of(4, LAYOUT, 1)
    word = index_of(WORDS, LAYOUT, 2)
    return gl.load(row_pointers(base + lane * WORDS, row, ROWS, ROW_WORDS) + word)


@gluon.jit
def load_half_words(base, ROWS: gl.constexpr):
    """Load consecutive rows of four int16, int32 `[ROWS, 4, 1]`: 8 codes of 2 bits each."""
    LAYOUT: gl.constexpr = _words_layout(ROWS, 1)
    row = index_of(ROWS, LAYOUT, 0)
    lane = index_of(4, LAYOUT, 1)
    return gl.load(row_pointers(base + lane, row, ROWS, 4)).to(gl.int32)


@gluon.jit
def _by_bytes(word, ROWS: gl.constexpr):
    """A word `[ROWS, 4]` as `[ROWS, 4, 1]` in the layout of its four bytes; no data moves."""
    LAYOUT: gl.constexpr = _byte_layout(ROWS)
    return gl.expand_dims(gl.convert_layout(word, gl.SliceLayout(2, LAYOUT)), 2)


@gluon.jit
def _widened(word, ROWS: gl.constexpr):
    zero = gl.zeros([ROWS, 4, 4], gl.int32, layout=_byte_layout(ROWS))
    return _by_bytes(word, ROWS) | zero


@gluon.jit
def _four(word, tables, ROWS: gl.constexpr):
    """The two registers of levels of a word of 8 codes of 4 bits."""
    return gl.inline_asm_elementwise(
        ASM4,
        OUT2,
        [_widened(word, ROWS), tables[0], tables[1], tables[2], tables[3]],
        (gl.int8, gl.int8),
        True,
        4,
    )


@gluon.jit
def _step(r0, r1, ROWS: gl.constexpr, MMA: gl.constexpr):
    """The two registers `[ROWS, j, i]` of a step of 32 codes as a first operand `[ROWS, 32]`."""
    x = gl.join(r0, r1)  # [rows, j, i, h]
    x = gl.reshape(gl.permute(x, (0, 3, 1, 2)), (ROWS, 32))
    return gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 4))


@gluon.jit
def _each_word(words, ROWS: gl.constexpr):
    """The words `[ROWS, 4]` of `load_words`, in order."""
    COUNT: gl.constexpr = words.shape[2]
    if COUNT == 1:
        return (gl.reshape(words, (ROWS, 4)),)
    elif COUNT == 2:
        w0, w1 = gl.split(words)
        return (w0, w1)
    else:
        even, odd = gl.split(gl.reshape(words, (ROWS, 4, COUNT // 2, 2)))
        first, second = _each_word(even, ROWS), _each_word(odd, ROWS)
        found = ()
        for i in gl.static_range(COUNT // 2):
            found = found + (first[i], second[i])
        return found


@gluon.jit
def levels(words, high, tables, ROWS: gl.constexpr, BITS: gl.constexpr, MMA: gl.constexpr):
    """First operands, one a step of 32 codes, from `load_words`; `high` has the third bits."""
    each = _each_word(words, ROWS)
    registers = ()
    if BITS == 8:
        for i in gl.static_range(len(each)):
            w = _widened(each[i], ROWS)
            registers = registers + (gl.inline_asm_elementwise(ASM8, OUT1, [w], gl.int8, True, 4),)
    elif BITS == 4:
        for i in gl.static_range(len(each)):
            r0, r1 = _four(each[i], tables, ROWS)
            registers = registers + (r0, r1)
    elif BITS == 2:
        for i in gl.static_range(len(each)):
            r0, r1, r2, r3 = gl.inline_asm_elementwise(
                ASM2,
                OUT4,
                [_widened(each[i], ROWS), tables[6], tables[7]],
                (gl.int8, gl.int8, gl.int8, gl.int8),
                True,
                4,
            )
            registers = registers + (r0, r1, r2, r3)
    else:
        gl.static_assert(BITS == 3)
        h = _each_word(high, ROWS)
        r = gl.inline_asm_elementwise(
            ASM3,
            OUT8,
            [
                _widened(each[0], ROWS),
                _widened(each[1], ROWS),
                _widened(h[0], ROWS),
                tables[4],
                tables[5],
            ],
            (gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
            True,
            4,
        )
        registers = (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7])
    steps = ()
    for i in gl.static_range(len(registers) // 2):
        steps = steps + (_step(registers[2 * i], registers[2 * i + 1], ROWS, MMA),)
    return steps


# ---- second operands ---------------------------------------------------------------------


@gluon.jit
def load_digits(base, COLUMNS: gl.constexpr, RANK: gl.constexpr, COUNT: gl.constexpr):
    """Load the query's digits for one band, int32 `[COLUMNS, 4, COUNT / 16]`, four in a word."""
    WORDS: gl.constexpr = COUNT // 16
    LAYOUT: gl.constexpr = _column_layout(COLUMNS, WORDS)
    column = index_of(COLUMNS, LAYOUT, 0)
    lane = index_of(4, LAYOUT, 1)
    word = index_of(WORDS, LAYOUT, 2)
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
def _digit_step(w0, w1, EVEN_FIRST: gl.constexpr, MMA: gl.constexpr):
    """The second operand `[32, COLUMNS]` from two words of every thread."""
    if EVEN_FIRST:
        even = gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [w0, w1], gl.int32, True, 1
        )
        odd = gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [w0, w1], gl.int32, True, 1
        )
    else:
        even, odd = w0, w1
    x = gl.join(_digit_bytes(even), _digit_bytes(odd))  # [column, j, i, h]
    return _second(gl.reshape(gl.permute(x, (3, 1, 2, 0)), (32, w0.shape[0])), MMA)


@gluon.jit
def digit_steps(x, EVEN_FIRST: gl.constexpr, MMA: gl.constexpr):
    """Second operands `[32, COLUMNS]` from `load_digits`, one a step of 32 components."""
    COLUMNS: gl.constexpr = x.shape[0]
    if x.shape[2] == 2:
        w0, w1 = gl.split(x)
        return (_digit_step(w0, w1, EVEN_FIRST, MMA),)
    else:
        even, odd = gl.split(gl.reshape(x, (COLUMNS, 4, 2, 2)))
        w0, w2 = gl.split(even)
        w1, w3 = gl.split(odd)
        return (_digit_step(w0, w1, EVEN_FIRST, MMA), _digit_step(w2, w3, EVEN_FIRST, MMA))


@gluon.constexpr_function
def weight_layout(columns):
    """`[columns, 128 tokens]`: a thread has 32 consecutive tokens of its columns."""
    regs = [[0, 1 << i] for i in range(5)]
    regs += [[8 << i, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[0, 0], [0, 0]], [], [columns, 128])


@gluon.jit
def weight_steps(x, EVEN_FIRST: gl.constexpr, MMA: gl.constexpr):
    """Second operands `[32, COLUMNS]` from weights int8 `[COLUMNS, 128]`, one a step of 32 tokens.

    Tokens have the order in which a permute gives the codes of V: for 2 and 3 bits, the even ones
    of every eight first.
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


# ---- fp16 operands of one warp, a sum over what lies in a row ------------------------------


@gluon.constexpr_function
def dims_layout(rows, dims):
    """`[rows, dims]`: a thread has a consecutive quarter of the dimensions of rows r, r + 8, ..."""
    regs = [[0, 1 << i] for i in range((dims // 4).bit_length() - 1)]
    regs += [[8 << i, 0] for i in range((rows // 8).bit_length() - 1)]
    lanes = [[0, dims // 4], [0, dims // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [], [], [rows, dims])


@gluon.jit
def from_dims(x, INDEX: gl.constexpr, MMA: gl.constexpr):
    """`[n, dims]` of `dims_layout` as the first or second operand of a sum over dimensions."""
    N: gl.constexpr = x.shape[0]
    DIMS: gl.constexpr = x.shape[1]
    x = gl.reshape(x, (N, 4, DIMS // 16, 2, 2))  # [n, j, step, h, e]
    if INDEX == 0:
        x = gl.reshape(gl.permute(x, (0, 2, 3, 1, 4)), (N, DIMS))
    else:
        x = gl.reshape(gl.permute(x, (2, 3, 1, 4, 0)), (DIMS, N))
    return gl.convert_layout(x, gl.DotOperandLayout(INDEX, MMA, 2), assert_trivial=True)


# $2: bytes b -> fp16 b - 128. 0x6400 | b is 1024 + b.
ASM_HALVES = gl.constexpr("""{
    .reg .b32 x, zero;
    mov.b32 zero, 0x64806480;
    prmt.b32 x, $2, 0x64646464, 0x4140;
    sub.f16x2 $0, x, zero;
    prmt.b32 x, $2, 0x64646464, 0x4342;
    sub.f16x2 $1, x, zero;
}""")


@gluon.jit
def half_integers(x):
    """The integers of basis rows in a page, stored as uint8 value + 128, as fp16."""
    return gl.inline_asm_elementwise(ASM_HALVES, "=r,=r,r", [x], gl.float16, True, 4)
