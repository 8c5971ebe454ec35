"""Rotary position embedding in the half-split convention (pairs i and i + rotary_dim / 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.kernels.page.layout import BLOCK_TOKENS, TILE_TOKENS


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary embedding of the keys in a sequence's pages.

    cos, sin: fp32 `[max_positions, rotary_dim / 2]`, the model's own table; empty where layers turn
        no key.
    first_position: position of the first token of block 0 (the number of landmarks).
    """

    cos: Tensor
    sin: Tensor
    first_position: int = 0

    @property
    def dim(self) -> int:
        """The number of a head's dimensions that RoPE turns."""
        return 2 * self.cos.shape[-1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Turn the first `2 * cos.shape[-1]` dimensions of `x` `[..., D]` by RoPE, in fp32.

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


def turned_with(first: Tensor, rope: str) -> Tensor:
    """The positions by which a block's keys are turned back before storing, int64 `[..., 512]`.

    Args:
        first: int `[...]`, position of each block's first token.
        rope: `pre`: a key by its own position. `frame`: a key by the middle of its frame of 128
            tokens, so that keys of a frame are turned only relative to each other. Decode then
            turns a query back once a frame, and no key.
    """
    place = torch.arange(BLOCK_TOKENS, device=first.device)
    if rope == "frame":
        place = place // TILE_TOKENS * TILE_TOKENS + TILE_TOKENS // 2
    return first.long().unsqueeze(-1) + place


def stored_keys(k: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """The keys of whole blocks in the form in which pages store them, fp32 `[..., 512, D]`.

    Args:
        k: `[..., 512, D]`, after RoPE.
        cos, sin: the model's table at the blocks' own positions, `[..., 512, rotary_dim / 2]`.
    """
    return _turned(k, cos, sin, rope, inverse=True)


def read_keys(k: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """The keys after RoPE of stored keys `k`: the inverse of `stored_keys`."""
    return _turned(k, cos, sin, rope, inverse=False)


def _turned(k: Tensor, cos: Tensor, sin: Tensor, rope: str, *, inverse: bool) -> Tensor:
    if rope == "post":
        return k.float()
    rows = turned_with(torch.zeros((), dtype=torch.long, device=k.device), rope)
    return rotate(k, cos[..., rows, :], sin[..., rows, :], inverse=inverse)


def block_rows(
    cos: Tensor, sin: Tensor, blocks: Tensor, first_position: int, rope: str
) -> tuple[Tensor, Tensor]:
    """Rows of the rotary table that turn the keys of `blocks` `[P]`: two `[P, 1, 512, half]`."""
    rows = turned_with(first_position + blocks * BLOCK_TOKENS, rope)
    return cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)
