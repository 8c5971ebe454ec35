"""Pages of every kind byte by byte: a numpy reader with literal offsets against the codec."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from spectral_paged.pages import BoundBasis, PageFormat, decode_pages, encode_pages
from spectral_paged.pages.shared_basis import SideRows
from support.page_parts import sections, toy_basis, toy_blocks

GAUSSIAN = {
    2: [-120, -36, 36, 120],
    3: [-125, -78, -44, -14, 14, 44, 78, 125],
    4: [-126, -95, -74, -58, 6, 18, 30, 43, -43, -30, -18, -6, 58, 74, 95, 126],
}
UNIFORM = {
    2: [-3, -1, 1, 3],
    3: [-7, -5, -3, -1, 1, 3, 5, 7],
    4: [-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15],
}


@dataclass
class Band:
    """count, bits, byte offsets of codes, third bits and basis rows (None: absent)."""

    count: int
    bits: int
    codes: int
    high: int | None = None
    basis: int | None = None
    basis_bits: int = 8


@dataclass
class Side:
    bands: list[Band]
    scale: int
    gain: int | None
    mean: int | None
    slots: int | None = None


@dataclass
class Drawing:
    """A page as drawn by hand: offsets count from the head's record; `used` of `head` bytes."""

    format: PageFormat
    sides: list[Side]
    index: int | None
    used: int
    head: int


MIXED = Drawing(
    PageFormat("mixed", 2, 64, ((16, 8), (16, 4), (16, 3), (16, 2)), ((16, 4), (16, 2)), gain=True),
    [
        Side(
            [
                Band(16, 8, 0, None, 8192),
                Band(16, 4, 9216, None, 13312),
                Band(16, 3, 14336, 16384, 17408),
                Band(16, 2, 18432, None, 20480),
            ],
            scale=21504,
            gain=21632,
            mean=22144,
        ),
        Side(
            [Band(16, 4, 22272, None, 26368), Band(16, 2, 27392, None, 29440)],
            scale=30464,
            gain=30528,
            mean=31040,
        ),
    ],
    index=None,
    used=31168,
    head=31232,
)
SMALL_ROWS = Drawing(
    PageFormat(
        "small-rows",
        1,
        32,
        ((16, 8), (16, 4)),
        ((16, 3),),
        basis_bits=4,
        scale_tokens=64,
        levels="uniform",
    ),
    [
        Side(
            [Band(16, 8, 0, None, 8192), Band(16, 4, 8704, None, 12800, 4)],
            scale=13056,
            gain=None,
            mean=13568,
        ),
        Side([Band(16, 3, 13632, 15680, 16704, 4)], scale=16960, gain=None, mean=17216),
    ],
    index=None,
    used=17280,
    head=17280,
)
SHARED = Drawing(
    PageFormat("shared", 2, 16, ((16, 2),), ((16, 4),), basis="shared", outlier_slots=3),
    [
        Side([Band(16, 2, 0)], scale=2048, gain=None, mean=2080, slots=2112),
        Side([Band(16, 4, 2208)], scale=6304, gain=None, mean=6336, slots=6368),
    ],
    index=6464,
    used=6470,
    head=6528,
)
DRAWINGS = {"mixed": MIXED, "small-rows": SMALL_ROWS, "shared": SHARED}


def unpacked(plane, bits, high=None):
    """Codes `[rows, count]` of bytes `[rows, ...]`, one component at a time."""
    if bits == 8:
        return plane.astype(int)
    per_byte = {4: 2, 3: 4, 2: 4}[bits]
    width = 8 // per_byte
    columns = [
        (plane[:, c // per_byte] >> (width * (c % per_byte))) & ((1 << width) - 1)
        for c in range(plane.shape[1] * per_byte)
    ]
    codes = np.stack(columns, 1).astype(int)
    if bits == 3:
        thirds = [(high[:, c // 8] >> (c % 8)) & 1 for c in range(codes.shape[1])]
        codes += 4 * np.stack(thirds, 1).astype(int)
    return codes


def by_component(plane, bits, count, high=None):
    """Codes `[512, count]` of V's bytes: tiles of 128 tokens, a row of bytes a component."""
    rows = plane.reshape(4 * count, -1)
    per_byte = {8: 1, 4: 2, 3: 4, 2: 4}[bits]
    codes = np.zeros((512, count), int)
    for tile in range(4):
        for c in range(count):
            row = rows[tile * count + c]
            for t in range(128):
                width = 8 // per_byte
                code = (int(row[t // per_byte]) >> (width * (t % per_byte))) & ((1 << width) - 1)
                if bits == 3:
                    word, place = t // 32, t % 32
                    bit = 4 * (place % 16 // 2) + 2 * (place // 16) + place % 2
                    byte = high.reshape(4 * count, -1)[tile * count + c][4 * word + bit // 8]
                    code += 4 * ((int(byte) >> (bit % 8)) & 1)
                codes[128 * tile + t, c] = code
    return codes


def level(codes, bits, levels):
    return codes - 128 if bits == 8 else np.array(levels[bits])[codes]


def read(page, drawing, shared=None):
    """K and V `[2, H, 512, D]` of a page's bytes, in fp64; `shared` rows `[2][H, rank, D]`."""
    format = drawing.format
    heads, dim, groups = format.num_kv_heads, format.head_dim, 512 // format.scale_tokens
    levels = GAUSSIAN if format.levels == "gaussian" else UNIFORM
    out = np.zeros((2, heads, 512, dim))

    def halves(record, offset, rows):
        return record[offset : offset + 2 * rows * dim].view("<f2").reshape(rows, dim)

    for head in range(heads):
        record = page[head * drawing.head : (head + 1) * drawing.head].copy()
        for s, side in enumerate(drawing.sides):
            values, own_rows = [], []
            for band in side.bands:
                size = 512 * band.count * {8: 8, 4: 4, 3: 2, 2: 2}[band.bits] // 8
                plane = record[band.codes : band.codes + size]
                high = None
                if band.high is not None:
                    high = record[band.high : band.high + 64 * band.count]
                if s == 0:
                    rows = None if high is None else high.reshape(512, -1)
                    codes = unpacked(plane.reshape(512, -1), band.bits, rows)
                else:
                    codes = by_component(plane, band.bits, band.count, high)
                values.append(level(codes, band.bits, levels))
                if band.basis is not None:
                    size = band.count * dim * band.basis_bits // 8
                    row = record[band.basis : band.basis + size].reshape(band.count, -1)
                    row = unpacked(row, band.basis_bits)
                    own_rows.append(level(row, band.basis_bits, GAUSSIAN))
            values = np.concatenate(values, 1).astype(float)
            rank = values.shape[1]
            scale = record[side.scale : side.scale + 2 * rank * groups].view("<u2")
            scale = (scale.astype("<u4") << 16).view("<f4").astype(float).reshape(groups, rank)
            values *= np.repeat(scale, 512 // groups, axis=0)
            if side.gain is not None:
                gain = record[side.gain : side.gain + 512].astype(float)
                values *= 2.0 ** ((gain[:, None] - 128) / 16)
            x = values @ (shared[s][head] if shared is not None else np.concatenate(own_rows))
            if side.mean is not None:
                x += halves(record, side.mean, 1)
            if side.slots is not None:
                count = format.outlier_slots
                tokens = record[drawing.index : drawing.index + 2 * count].view("<u2")
                x[tokens] = halves(record, side.slots, count)
            out[s, head] = x
    return out


def golden(drawing):
    """A page of arithmetic patterns: every byte of codes and rows differs from its neighbours."""
    format = drawing.format
    dim, groups = format.head_dim, 512 // format.scale_tokens
    page = np.zeros(format.num_kv_heads * drawing.head, np.uint8)
    for head in range(format.num_kv_heads):
        record = page[head * drawing.head : (head + 1) * drawing.head]

        def put(offset, data, record=record):
            record[offset : offset + len(data)] = data

        def pattern(count, step, record=record, head=head):
            return ((np.arange(count) * step + head * 59) % 251).astype(np.uint8)

        for s, side in enumerate(drawing.sides):
            for i, band in enumerate(side.bands):
                size = 512 * band.count * {8: 8, 4: 4, 3: 2, 2: 2}[band.bits] // 8
                put(band.codes, pattern(size, 7 + 2 * i + s))
                if band.high is not None:
                    put(band.high, pattern(64 * band.count, 13))
                if band.basis is not None:
                    put(band.basis, pattern(band.count * dim * band.basis_bits // 8, 29 + i))
            rank = sum(b.count for b in side.bands)
            scale = 2.0 ** -(1 + np.arange(groups * rank) % 7) * (1 + np.arange(groups * rank) % 2)
            put(side.scale, (scale.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8))
            if side.gain is not None:
                put(side.gain, (96 + np.arange(512) * 5 % 64).astype(np.uint8))
            if side.mean is not None:
                put(side.mean, (np.arange(dim) - 3.5 * s + head).astype("<f2").view(np.uint8))
            if side.slots is not None:
                exact = np.arange(format.outlier_slots * dim) * 0.25 - 9 * s + head
                put(side.slots, exact.astype("<f2").view(np.uint8))
        if drawing.index is not None:
            tokens = np.array([0, 200 + head, 511][: format.outlier_slots], "<u2")
            put(drawing.index, tokens.view(np.uint8))
    return page


def by_hand(format, layers=3):
    """A bound basis of small numbers, other ones in every layer; rows are not orthonormal."""
    heads, dim = format.num_kv_heads, format.head_dim
    g = torch.Generator().manual_seed(4)
    sides = []
    for rank in (format.k_rank, format.v_rank):
        rows = torch.randint(-9, 10, (layers, heads, rank, dim), generator=g) / 8
        plain = torch.eye(dim).expand(layers, heads, dim, dim)
        sides.append(SideRows(rows, rows, plain, plain))
    return BoundBasis(replace(format, basis_id="0123456789abcdef"), *sides)


def decoded(page, drawing):
    """The codec's reading and the numpy reader's."""
    pages = torch.from_numpy(page.copy())[None]
    if drawing.format.basis == "page":
        return decode_pages(pages, drawing.format), read(page, drawing)
    basis = by_hand(drawing.format)
    rows = [basis.side(s).rows[1].double().numpy() for s in "kv"]
    return decode_pages(pages, basis.format, basis=basis, layers=[1]), read(page, drawing, rows)


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
def test_a_page_has_the_bytes_of_its_drawing(drawing):
    assert drawing.format.page_bytes == drawing.format.num_kv_heads * drawing.head
    assert drawing.used <= drawing.head < drawing.used + 128


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
def test_hand_written_bytes_decode_to_hand_computed_values(drawing):
    got, want = decoded(golden(drawing), drawing)
    for x, y in zip(got, want):
        assert np.abs(x[0].double().numpy() - y).max() < 1e-6 * np.abs(y).max()


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
def test_views_cover_every_byte_but_the_padding(drawing):
    source = torch.from_numpy(golden(drawing))[None]
    target = torch.zeros_like(source)
    for x, y in zip(sections(target, drawing.format), sections(source, drawing.format)):
        x.copy_(y)
    assert torch.equal(target, source)
    full = torch.zeros_like(source)
    for x in sections(full, drawing.format):
        x.view(torch.uint8).fill_(255)
    records = full.view(-1, drawing.head)
    assert int((records == 255).sum(1).min()) >= drawing.used - 15
    assert not records[:, drawing.used :].any()


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
def test_encode_writes_where_the_drawing_says(drawing):
    """The numpy reader finds the block in a fresh page; padding stays zero."""
    format = drawing.format
    k, v = toy_blocks(1, format.num_kv_heads, format.head_dim)
    given, rows = {}, None
    if format.basis == "shared":
        basis = toy_basis(3, format.num_kv_heads, format.head_dim).bind(format)
        given = {"basis": basis, "layers": [2]}
        rows = [basis.side(s).rows[2].double().numpy() for s in "kv"]
    page = encode_pages(k, v, format, **given)
    values = read(page[0].numpy(), drawing, rows)
    assert not page.view(-1, drawing.head)[:, drawing.used :].any()
    for x, y, z in zip(decode_pages(page, format, **given), values, (k, v)):
        assert np.allclose(x[0].double().numpy(), y, atol=1e-4)
        want = z[0].double().numpy()
        assert np.linalg.norm(y - want) < 0.4 * np.linalg.norm(want)


def test_pages_of_other_layers_are_read_with_other_rows():
    page = torch.from_numpy(golden(SHARED))[None].expand(2, -1).contiguous()
    basis = by_hand(SHARED.format)
    k, _ = decode_pages(page, basis.format, basis=basis, layers=[0, 2])
    assert not torch.allclose(k[0], k[1])
    swapped, _ = decode_pages(page, basis.format, basis=basis, layers=[2, 0])
    assert torch.equal(swapped, k.flip(0))
