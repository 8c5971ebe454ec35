"""Rotary position embedding in the half-split convention (pairs i and i + rotary_dim / 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` dimensions of `x` `[..., D]`, in fp32.

    `cos` and `sin` are `[..., rotary_dim / 2]` and broadcast against `x`. Where the model scales
    both by s (YaRN, longrope), the inverse divides by s^2 = cos^2 + sin^2, so that
    `rotate(rotate(x), inverse=True)` is x. Su et al. 2021, RoFormer.
    """
    x = x.float()
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if inverse:
        squared = cos * cos + sin * sin
        cos, sin = cos / squared, -sin / squared
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
