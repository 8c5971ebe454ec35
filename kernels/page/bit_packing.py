"""Packing of codes of 8, 4, 3 and 2 bits into bytes and back, in the order of `BandLayout`."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_CODES = 32  # codes whose third bits share a word, where codes lie by component


def pack(codes: Tensor, bits: int, *, by_component: bool = False) -> tuple[Tensor, Tensor | None]:
    """Pack uint8 codes `[..., count]`: the plane uint8 `[..., count * min(bits, ...) / 8]` and, for
    3 bits, the plane of the third bits `[..., count / 8]`.
    """
    if bits == 8:
        return codes, None
    if bits == 3:
        thirds = codes >> 2
        return _pack(codes & 3, 2), _pack(_interleaved(thirds) if by_component else thirds, 1)
    return _pack(codes, bits), None


def unpack(plane: Tensor, high: Tensor | None, bits: int, *, by_component: bool = False) -> Tensor:
    """The codes that `pack` packed, uint8 `[..., count]`."""
    if bits == 8:
        return plane
    if bits == 3:
        assert high is not None, "3-bit codes have two planes"
        thirds = _unpack(high, 1)
        thirds = _in_order(thirds) if by_component else thirds
        return _unpack(plane, 2) | (thirds << 2)
    return _unpack(plane, bits)


def _interleaved(thirds: Tensor) -> Tensor:
    """Third bits in the order of a word's bits: code 16a + 2i + b goes to bit 4i + 2a + b."""
    words = thirds.unflatten(-1, (-1, 2, WORD_CODES // 4, 2))  # [.., a, i, b]
    return words.transpose(-3, -2).flatten(-4)


def _in_order(bits: Tensor) -> Tensor:
    """Third bits in the order of their codes: the inverse of `_interleaved`."""
    words = bits.unflatten(-1, (-1, WORD_CODES // 4, 2, 2))  # [.., i, a, b]
    return words.transpose(-3, -2).flatten(-4)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _pack(codes: Tensor, bits: int) -> Tensor:
    parts = codes.unflatten(-1, (-1, 8 // bits)) << _shifts(bits, codes.device)
    return parts.sum(dim=-1, dtype=torch.uint8)


def _unpack(plane: Tensor, bits: int) -> Tensor:
    parts = plane.unsqueeze(-1) >> _shifts(bits, plane.device)
    return (parts & ((1 << bits) - 1)).flatten(-2)
