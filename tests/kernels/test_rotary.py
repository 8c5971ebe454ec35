"""Rotary tables against complex numbers, at the edges of a head."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.rope import RotaryTable

POSITIONS = torch.tensor([0, 1, 63, 500])


def table(rotary_dim, scaling=1.0, interleaved=False):
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    return RotaryTable.from_inv_freq(
        frequencies, max_positions=512, attention_scaling=scaling, interleaved=interleaved
    )


@pytest.mark.parametrize("rotary_dim", [2, 16, 30, 32])
@pytest.mark.parametrize("scaling", [1.0, 1.25])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers_and_other_dimensions_stay(rotary_dim, scaling, interleaved):
    rope = table(rotary_dim, scaling, interleaved)
    x = torch.randn(len(POSITIONS), 3, 32)
    turned, half = rope.apply(x, POSITIONS), rotary_dim // 2
    if interleaved:
        real, imaginary = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        real, imaginary = slice(0, half), slice(half, rotary_dim)
    angle = POSITIONS[:, None, None] * 10000.0 ** -(torch.arange(half) / half)
    want = torch.complex(x[..., real], x[..., imaginary]) * torch.polar(
        torch.full_like(angle, scaling), angle
    )
    torch.testing.assert_close(turned[..., real], want.real, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[..., imaginary], want.imag, atol=1e-4, rtol=1e-4)
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    torch.testing.assert_close(rope.undo(turned, POSITIONS), x, atol=1e-4, rtol=1e-4)
