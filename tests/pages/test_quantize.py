"""Quantization of coefficients: its error, the benefit of gains and refits, and extremes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.kernels.page.layout import LEVEL_UNIT, LEVELS
from spectral_paged.kernels.page.view import code_values, gain_values
from spectral_paged.pages import PageFormat
from spectral_paged.pages.quantize import encode_values, quantize

RANK = 32
FORMAT = PageFormat("t", 1, 64, ((RANK, 8),), ((RANK, 8),))
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497}  # Max 1960, table 1: mean squared error


def quantized(x, bits, unit=1.0, **changes):
    bands = ((x.shape[-1], bits),) if isinstance(bits, int) else bits
    units = torch.full((len(x), x.shape[-1]), unit)
    return quantize(x, bands, replace(FORMAT, **changes), units)


def error(x, bits, **changes):
    return float((quantized(x, bits, **changes).values - x).square().mean())


def read_back(q, bands, levels, unit):
    """The coefficients that codes, scales and gains stand for, `[N, 512, rank]`."""
    parts = [code_values(c, bits, levels) for c, (_, bits) in zip(q.codes, bands)]
    groups = torch.cat(parts, -1).unflatten(-2, (q.scale.shape[-2], -1))
    values = (groups * (q.scale.float() * unit).unsqueeze(-2)).flatten(-3, -2)
    return values if q.gain is None else values * gain_values(q.gain).unsqueeze(-1)


# ---- levels ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_symmetric_and_fit_a_byte(bits):
    for table in LEVELS.values():
        levels = sorted(set(table[bits]))
        assert len(levels) == 2**bits
        assert [-x for x in reversed(levels)] == levels and levels[-1] <= 127


def test_codes_that_two_byte_permutes_tell_apart_have_one_sign():
    """Code n answers from the first table, n + 8 from the second: see `LEVELS`."""
    table = LEVELS["gaussian"][4]
    for n in range(8):
        assert (table[n] < 0) == (table[n + 8] < 0) == (n < 4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_gaussian_costs_what_lloyd_and_max_say(bits):
    assert error(torch.randn(64, 512, RANK), bits) == pytest.approx(LLOYD_MAX[bits], rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale_tokens", [64, 512])
def test_gaussian_levels_beat_uniform_ones_on_a_gaussian(bits, scale_tokens):
    x = torch.randn(8, 512, RANK)
    gaussian, uniform = (
        error(x, bits, levels=name, scale_tokens=scale_tokens) for name in ("gaussian", "uniform")
    )
    assert gaussian < 0.9 * uniform


@pytest.mark.parametrize("levels", ["gaussian", "uniform"])
def test_more_bits_err_less(levels):
    x = torch.randn(8, 512, RANK)
    errors = [error(x, bits, levels=levels) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[-2] / 20


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("levels", ["gaussian", "uniform"])
def test_a_code_is_the_nearest_level(bits, levels):
    x = torch.cat((torch.randn(500) * 60, torch.tensor([0.0, 1e9, -1e9, 1e30, -1e30])))
    table = torch.arange(-127, 128.0) if bits == 8 else torch.tensor(LEVELS[levels][bits]).float()
    got = code_values(encode_values(x, bits, levels), bits, levels)
    best = (x.unsqueeze(-1) - table).abs().amin(-1)
    assert torch.allclose((x - got).abs(), best, rtol=1e-6)


# ---- scales ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([2, 3, 4]),
    tail=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    scale_tokens=st.sampled_from([64, 512]),
)
def test_fitted_scales_err_no_more_than_root_mean_square_ones(seed, bits, tail, scale_tokens):
    """For every component and group; a bf16 scale may cost a thousandth."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 512, RANK, generator=g)
    x = x * (tail * torch.randn(x.shape, generator=g)).exp()
    groups = x.unflatten(-2, (-1, scale_tokens))
    rms = groups.square().mean(-2, keepdim=True).sqrt() / LEVEL_UNIT[bits]
    rms = rms.bfloat16().float()
    plain = code_values(encode_values(groups / rms, bits, "gaussian"), bits, "gaussian") * rms
    fitted = quantized(x, bits, scale_tokens=scale_tokens).values.unflatten(-2, (-1, scale_tokens))
    worse = (groups - fitted).square().sum(-2) / (groups - plain).square().sum(-2)
    assert float(worse.max()) < 1.001


def test_scales_of_fewer_tokens_follow_a_change_inside_the_block():
    x = torch.randn(4, 512, RANK)
    x[:, 256:] *= 30
    quiet = slice(0, 256)
    errors = [
        float((quantized(x, 4, scale_tokens=n).values - x)[:, quiet].square().mean())
        for n in (512, 256, 64)
    ]
    assert errors[1] < errors[0] / 20 and errors[2] < errors[0] / 20


MIXED = ((8, 8), (8, 4), (8, 3), (8, 2))


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("levels", ["gaussian", "uniform"])
@pytest.mark.parametrize("scale_tokens", [64, 512])
def test_values_are_what_the_codes_stand_for(gain, levels, scale_tokens):
    """Components that are zero too, where no scale says so: outliers are chosen by these."""
    x = torch.randn(3, 512, 32) * torch.logspace(2, -2, 32)
    x[..., [1, 9, 17, 25]] = 0.0
    x[0, :64] = 0.0
    x[1] = 0.0
    unit = torch.rand(3, 32) + 0.5
    format = replace(FORMAT, gain=gain, levels=levels, scale_tokens=scale_tokens)
    q = quantize(x, MIXED, format, unit)
    want = read_back(q, MIXED, levels, unit.unsqueeze(-2))
    assert torch.allclose(q.values, want, rtol=1e-5, atol=0)
    assert not q.values[..., [1, 9, 17, 25]].any() and not q.values[1].any()
    assert [c.dtype for c in q.codes] == [torch.uint8] * 4 and q.scale.dtype == torch.bfloat16


# ---- gain --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gains_help_tokens_of_different_loudness(bits):
    x = torch.randn(8, 512, RANK) * torch.randn(8, 512, 1).exp()
    relative = []
    for gain in (False, True):
        lost = (quantized(x, bits, gain=gain).values - x).square().sum(-1)
        relative.append(float((lost / x.square().sum(-1)).mean()))
    assert relative[1] < 1.5 * LLOYD_MAX[bits] and relative[1] < relative[0] / 2
    assert error(x, bits, gain=True) < error(x, bits)


def test_gains_cost_next_to_nothing_where_tokens_are_equally_loud():
    x = torch.randn(8, 512, RANK)
    assert error(x, 3, gain=True) < 1.02 * error(x, 3)


def test_gains_are_read_off_the_low_bands_alone():
    x = torch.randn(2, 512, 32)
    loud = x.clone()
    loud[:, 5, :8] *= 1000
    gains = [quantized(y, ((8, 8), (24, 3)), gain=True).gain for y in (x, loud)]
    assert torch.equal(*gains)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_gain_of_a_silent_token_harms_nobody(bits):
    x = torch.randn(4, 512, RANK)
    silent = x.clone()
    silent[:, [0, 77, 511]] = 0.0
    q = quantized(silent, bits, gain=True)
    assert bool(torch.isfinite(q.values).all())
    assert bool((q.gain[:, [0, 77, 511]] == 1).all())  # the least there is: 0 marks an outlier
    assert float(q.values[:, [0, 77, 511]].abs().max()) < 0.02
    others = torch.ones(512, dtype=torch.bool)
    others[[0, 77, 511]] = False
    plain = quantized(x, bits, gain=True).values[:, others] - x[:, others]
    got = q.values[:, others] - x[:, others]
    assert float(got.norm()) < 1.02 * float(plain.norm())


def test_a_gain_code_is_a_sixteenth_of_an_octave():
    codes = torch.tensor([128, 144, 112, 0, 255], dtype=torch.uint8)
    want = torch.tensor([1.0, 2.0, 0.5, 2.0**-8, 2.0 ** (127 / 16)])
    assert torch.allclose(gain_values(codes), want, rtol=1e-6)


# ---- extremes ----------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("levels", ["gaussian", "uniform"])
def test_nothing_comes_back_as_nothing(gain, levels):
    q = quantized(torch.zeros(2, 512, 32), MIXED, gain=gain, levels=levels)
    assert not q.values.any() and not q.scale.any()


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("gain", [True, False])
def test_magnitude_changes_no_relative_error(factor, gain):
    """The codec brings blocks near 1, but a block's components may lie far apart."""
    x = torch.randn(4, 512, 32)
    want = error(x, MIXED, gain=gain)
    scaled = quantized(x * factor, MIXED, gain=gain).values.double() / factor
    assert float((scaled - x).square().mean()) == pytest.approx(want, rel=0.03)


def test_one_token_out_of_range_is_clamped_to_the_outermost_level():
    x = torch.randn(1, 512, RANK)
    x[0, 7] = 1e4
    q = quantized(x, 4)
    assert bool((q.codes[0][0, 7] == 15).all()) and bool(torch.isfinite(q.values).all())
