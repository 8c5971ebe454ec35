"""Reading of a block's tokens from exact pages, in the form that spectral pages store (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_of(
    pages_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    first,
    token,
    dim,
    TURN: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
):
    """K or V of a block's tokens `token`, fp32 rows; with `TURN`, keys are turned back by frame."""
    page = tl.load(pages_ptr + token // 64).to(tl.int64)
    row = values_ptr + (page * UNIT + token % 64 * DIM)[:, None]
    there = (dim < DIM)[None, :] & (token >= 0)[:, None]
    x = tl.load(row + dim[None, :], mask=there, other=0.0).to(tl.float32)
    if TURN:
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        turned = (dim < 2 * HALF)[None, :] & there
        y = tl.load(row + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        middle = first + token // 128 * 128 + 64
        angle = middle[:, None] * HALF + (dim % HALF)[None, :]
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        sign = tl.where(dim < HALF, 1.0, -1.0)[None, :]
        # a table scaled by s turns back by 1 / s^2, as `rotary.rotate` does
        x = (x * cos + sign * sin * y) / (cos * cos + sin * sin)
    return x
