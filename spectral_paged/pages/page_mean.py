"""The page mean is that of a block's ordinary tokens.

A loud token moves a plain mean away from all the others, whose coefficients then have to make up
for it. Formats with outlier slots store the loudest tokens exactly, so their means leave them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOUD_STEPS = 6  # as a power of two of squares: a loud token lies over 8 typical distances away
LOUD_PASSES = 2  # the first centre is the plain mean, from which only the very loudest stand out
TINY = 1e-30


def ordinary_tokens(x: Tensor) -> Tensor:
    """Which tokens of fp32 blocks `x` `[N, T, D]` are not loud: bool `[N, T]`.

    A token is loud if its distance from the mean of the ordinary ones is 8 times their geometric
    mean or more. At least one token is ordinary.
    """
    # a power of two per block scales the values near 1, so that squares of any finite block fit
    _, exponent = torch.frexp(x.abs().amax(dim=(-2, -1), keepdim=True))
    y = x / torch.exp2(exponent.clamp(-100, 100).float())
    ordinary = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    for _ in range(LOUD_PASSES):
        off = y - mean_of(y, ordinary).unsqueeze(-2)
        steps = off.square().sum(dim=-1).clamp_min(TINY).log2()
        ordinary = steps < steps.mean(dim=-1, keepdim=True) + LOUD_STEPS
    return ordinary


def mean_of(x: Tensor, tokens: Tensor) -> Tensor:
    """The mean of the `tokens` (bool `[N, T]`) of `x` `[N, T, D]`: `[N, D]`."""
    kept = x.masked_fill(~tokens.unsqueeze(-1), 0.0)
    # division comes before the sum, because a sum of 512 finite values may overflow
    return (kept / tokens.sum(dim=-1)[:, None, None]).sum(dim=-2)
