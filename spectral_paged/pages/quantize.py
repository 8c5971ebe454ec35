"""Quantization turns coefficients into codes of levels, with scales and gains.

Bands below 8 bits use the Lloyd-Max levels of a normal variable (Max 1960; Lloyd 1982) on
coefficients divided by their token's gain, with scales refitted to the codes by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from spectral_paged.kernels.page.layout import (
    COEFF_OFFSET,
    GAIN_OFFSET,
    GAIN_SKIPPED,
    GAIN_STEPS,
    LEVEL_UNIT,
    LEVELS,
)
from spectral_paged.kernels.page.view import code_values, gain_values
from spectral_paged.pages.format import PageFormat
from spectral_paged.pages.sections import Bands

INT8_MAX = 127
REFITS = 2
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Quantized:
    """Coefficients `[N, 512, rank]` as a page stores them.

    codes: uint8 `[N, 512, count]` a band.
    scale: bf16 `[N, groups, rank]`.
    gain: uint8 `[N, 512]`.
    values: fp32 `[N, 512, rank]`, the coefficients that the codes represent.
    """

    codes: list[Tensor]
    scale: Tensor
    gain: Tensor | None
    values: Tensor


def quantize(coeff: Tensor, bands: Bands, format: PageFormat, unit: Tensor) -> Quantized:
    """Quantize fp32 `coeff` `[N, 512, rank]`, components in band order.

    Args:
        unit: fp32 `[N, rank]`, the factor from a stored scale to the scale of `coeff` (it contains
            the basis rows' own scales); scales are rounded after division by it.
    """
    gain_codes = _gains(coeff, bands) if format.gain else None
    gain = None if gain_codes is None else gain_values(gain_codes).unsqueeze(-1)
    plain = coeff if gain is None else coeff / gain
    groups = coeff.shape[-2] // format.scale_tokens
    codes, scales, values, first = [], [], [], 0
    for count, bits in bands:
        span = slice(first, first + count)
        shape = (groups, format.scale_tokens)
        band = _quantize_band(
            plain[..., span].unflatten(-2, shape),
            None if gain is None else gain.unflatten(-2, shape),
            bits,
            format.levels,
            unit[..., None, None, span],
        )
        codes.append(band[0].flatten(-3, -2))
        scales.append(band[1].squeeze(-2))
        values.append(band[2].flatten(-3, -2))
        first += count
    rebuilt = torch.cat(values, dim=-1)
    return Quantized(
        codes,
        torch.cat(scales, dim=-1),
        gain_codes,
        rebuilt if gain is None else rebuilt * gain,
    )


def _quantize_band(
    x: Tensor, gain: Tensor | None, bits: int, levels: str, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, bf16 scales `[.., groups, 1, count]` and values of `x` `[.., groups, tokens, count]`.

    `gain` `[.., groups, tokens, 1]` weighs the errors, because `x` was divided by it.
    """
    if bits == 8 or levels == "uniform":
        top = INT8_MAX if bits == 8 else LEVELS["uniform"][bits][-1]
        scale, step = _stored(x.abs().amax(dim=-2, keepdim=True) / top, unit)
        codes = _nearest(x, step, bits, levels)
        return codes, scale, code_values(codes, bits, levels) * step
    weight = torch.ones_like(x[..., :1]) if gain is None else gain.square()
    # a refit never raises the error of the stored values, so the last one is kept
    energy = (weight * x.square()).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
    scale, step = _stored(energy.sqrt() / LEVEL_UNIT[bits], unit)
    codes = _nearest(x, step, bits, levels)
    for _ in range(REFITS):
        integers = code_values(codes, bits, levels)
        fitted = (weight * x * integers).sum(-2, keepdim=True)
        fitted = fitted / (weight * integers.square()).sum(-2, keepdim=True).clamp_min(TINY)
        scale, step = _stored(fitted, unit)
        codes = _nearest(x, step, bits, levels)
    return codes, scale, code_values(codes, bits, levels) * step


def _stored(scale: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """A scale as the page stores it (bf16, in multiples of `unit`), and its value when read."""
    stored = (scale / unit).bfloat16()
    return stored, stored.float() * unit


def _nearest(x: Tensor, step: Tensor, bits: int, levels: str) -> Tensor:
    """Codes of the levels nearest to `x / step`; where `step` is zero, every code reads as zero."""
    return encode_values(x / torch.where(step == 0, torch.ones_like(step), step), bits, levels)


def encode_values(x: Tensor, bits: int, levels: str) -> Tensor:
    """uint8 codes of the levels nearest to `x`."""
    if bits == 8:
        return (x.round().clamp(-INT8_MAX, INT8_MAX) + COEFF_OFFSET).to(torch.uint8)
    table, reach = _code_table(bits, levels, x.device)
    # levels are integers, so borders between two lie at multiples of 1/2: ceil(2 x) is enough
    index = ((2 * x).ceil_().clamp_(-reach, reach) + reach).to(torch.int32)
    return table.index_select(0, index.flatten()).view(x.shape)


@cache
def _code_table(bits: int, levels: str, device: torch.device) -> tuple[Tensor, int]:
    """The code of each `ceil(2 x) + reach`, uint8 `[2 reach + 1]`; ties go to the lower level."""
    integers = sorted(LEVELS[levels][bits])
    code_of = torch.tensor([LEVELS[levels][bits].index(x) for x in integers], dtype=torch.uint8)
    reach = 2 * integers[-1]
    doubled = torch.arange(-reach, reach + 1)
    borders = torch.tensor([a + b for a, b in pairwise(integers)])  # twice the midpoints
    codes = code_of[(doubled.unsqueeze(-1) > borders).sum(dim=-1)]
    return codes.to(device), reach


def _gains(coeff: Tensor, bands: Bands) -> Tensor:
    """Gain codes uint8 `[N, 512]`: each token's root mean square over the low bands' components.

    Components are whitened, by two alternating fits of gains and component energies. 8-bit bands
    have bits to spare and count only if there are no others.
    """
    low = [bits < 8 for count, bits in bands for _ in range(count)]
    if any(low):
        coeff = coeff[..., torch.tensor(low, device=coeff.device)]
    squares = coeff.square()
    gain = torch.ones_like(squares[..., :1])
    for _ in range(2):
        energy = (squares / gain).mean(dim=-2, keepdim=True).clamp_min(TINY)
        gain = (squares / energy).mean(dim=-1, keepdim=True).clamp_min(TINY)
    steps = gain.squeeze(-1).log2() * (GAIN_STEPS / 2) + GAIN_OFFSET
    return steps.round().clamp(GAIN_SKIPPED + 1, 255).to(torch.uint8)
