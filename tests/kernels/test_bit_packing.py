"""Codes of 8, 4, 3 and 2 bits survive packing, and lie in the bytes that the drawing shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.kernels.page.bit_packing import pack, unpack


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 4, 3, 2]),
    count=st.integers(1, 16).map(lambda n: 16 * n),
    shape=st.lists(st.integers(1, 4), max_size=3),
    by_component=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_what_is_packed_is_unpacked(bits, count, shape, by_component, seed):
    count = 2 * count if by_component else count  # whole words of third bits
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (*shape, count), generator=g, dtype=torch.uint8)
    plane, high = pack(codes, bits, by_component=by_component)
    plane_bits = 2 if bits == 3 else bits
    assert plane.dtype == torch.uint8 and plane.shape == (*shape, count * plane_bits // 8)
    assert (high is None) == (bits != 3)
    if high is not None:
        assert high.dtype == torch.uint8 and high.shape == (*shape, count // 8)
    assert torch.equal(unpack(plane, high, bits, by_component=by_component), codes)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_byte_is_the_code_of_something(bits):
    """No byte pattern is refused or lost: poisoned and foreign pages can be read."""
    plane = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 4).contiguous()
    high = plane.flip(0)[:, :2].contiguous() if bits == 3 else None
    codes = unpack(plane, high, bits)
    assert int(codes.max()) == (1 << bits) - 1
    again = pack(codes, bits)
    assert torch.equal(again[0], plane)
    assert high is None or torch.equal(again[1], high)


BYTES = [
    (8, [0, 1, 127, 128, 255, 7, 8, 9], [0x00, 0x01, 0x7F, 0x80, 0xFF, 7, 8, 9], None),
    (4, [1, 2, 3, 4, 15, 0, 0, 15], [0x21, 0x43, 0x0F, 0xF0], None),
    (2, [0, 1, 2, 3, 3, 0, 0, 1], [0xE4, 0x43], None),
    # low bits 0 1 2 3 0 1 2 3, third bits 0 0 0 0 1 1 1 1
    (3, [0, 1, 2, 3, 4, 5, 6, 7], [0xE4, 0xE4], [0xF0]),
    (3, [4, 0, 0, 0, 0, 0, 0, 3], [0x00, 0xC0], [0x01]),
]


@pytest.mark.parametrize("bits, codes, plane, high", BYTES)
def test_codes_lie_where_the_drawing_says(bits, codes, plane, high):
    # two tokens of two times the components: a token's bytes are its own
    tokens = torch.tensor([codes * 2, [0] * 16], dtype=torch.uint8)
    got, got_high = pack(tokens, bits)
    assert got.tolist() == [plane * 2, [0] * len(plane * 2)]
    if high is not None:
        assert got_high.tolist() == [high * 2, [0, 0]]


def test_third_bits_of_a_component_lie_where_a_mask_finds_them():
    """Code 16a + 2i + b in bit 4i + 2a + b: under a nibble's third bit after one shift."""
    for code in range(32):
        a, i, b = code // 16, code % 16 // 2, code % 2
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        codes[0, code] = 4
        plane, high = pack(codes, 3, by_component=True)
        assert not plane.any()
        word = int.from_bytes(bytes(high[0].tolist()), "little")
        assert word == 1 << (4 * i + 2 * a + b)
