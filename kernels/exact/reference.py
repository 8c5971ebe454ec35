"""Writing of new keys and values into exact pages, and reading of them, in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_paged.kernels.page.layout import (
    BLOCK_TOKENS,
    EXACT_PAGE_TOKENS,
    UNIT_BYTES,
    exact_page_bytes,
)
from spectral_paged.kernels.page.view import gather_units


def exact_append(k: Tensor, v: Tensor, plane: Tensor, units: Tensor, offsets: Tensor) -> None:
    """Store `k`, `v` `[T, H, D]` (model dtype, keys after RoPE) in exact pages of one layer.

    Args:
        plane: uint8, one layer's plane.
        units: int `[T]`, the unit at which the page of each token begins; a negative one is padding
            of a batch, for which nothing is stored.
        offsets: int `[T]`, the token's place in its page, 0 to 63.
    """
    num_heads, dim = k.shape[1:]
    real = units >= 0
    if not bool(real.all()):
        k, v, units, offsets = k[real], v[real], units[real], offsets[real]
    values = plane.view(k.dtype)
    base = units.long() * (UNIT_BYTES // k.element_size()) + offsets.long() * dim
    heads = torch.arange(num_heads, device=k.device) * (2 * EXACT_PAGE_TOKENS * dim)
    start = base[:, None, None] + heads[:, None]  # [T, H, 1]
    index = start + torch.arange(dim, device=k.device)
    values[index] = k
    values[index + EXACT_PAGE_TOKENS * dim] = v


def exact_gather(
    plane: Tensor,
    units: Tensor,
    num_tokens: int,
    num_heads: int,
    dim: int,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Copy the first `num_tokens` tokens of a list of exact pages: k, v `[H, num_tokens, D]`.

    The copies are written into `out` where it is given.
    """
    num_pages = -(-num_tokens // EXACT_PAGE_TOKENS)
    page_bytes = exact_page_bytes(num_heads, dim, dtype.itemsize)
    raw = gather_units(plane, units[:num_pages], page_bytes).view(dtype)
    pages = raw.view(num_pages, num_heads, 2, EXACT_PAGE_TOKENS, dim)
    kv = pages.permute(2, 1, 0, 3, 4).reshape(2, num_heads, num_pages * EXACT_PAGE_TOKENS, dim)
    found = kv[0, :, :num_tokens], kv[1, :, :num_tokens]
    return found if out is None else (out[0].copy_(found[0]), out[1].copy_(found[1]))


class ExactPlaces(NamedTuple):
    """Exact pages of any sequences and where their tokens belong, int32 `[num_pages]` each.

    units: the unit at which a page begins.
    rows: the row of K and V to which its first token is written.
    counts: the number of its tokens that are written, 0 to 64.
    """

    units: Tensor
    rows: Tensor
    counts: Tensor


def exact_copy(plane: Tensor, places: ExactPlaces, out: Tensor) -> None:
    """Copy tokens of exact pages to rows of K and V, `out` `[2 (K|V), H, rows, D]`."""
    num_heads, _, dim = out.shape[1:]
    page_bytes = exact_page_bytes(num_heads, dim, out.element_size())
    raw = gather_units(plane, places.units, page_bytes).view(out.dtype)
    pages = raw.view(-1, num_heads, 2, EXACT_PAGE_TOKENS, dim).permute(2, 1, 0, 3, 4)
    tokens = torch.arange(EXACT_PAGE_TOKENS, device=plane.device)
    rows = places.rows.long().unsqueeze(-1) + tokens
    there = tokens < places.counts.unsqueeze(-1)
    out[:, :, rows[there]] = pages[:, :, there]


def read_blocks(
    planes: Tensor, exact: Tensor, num_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Read K and V of whole blocks, `[B, L, H, 512, D]`, from their exact pages.

    Args:
        planes: uint8 `[L, plane_bytes]`.
        exact: int `[B, 8]`, the exact pages of each block in 128-byte units, the same in every
            plane.
    """
    num_tokens = exact.numel() * EXACT_PAGE_TOKENS
    found = [
        exact_gather(plane, exact.flatten(), num_tokens, num_heads, dim, dtype) for plane in planes
    ]
    k, v = (
        torch.stack(side).unflatten(2, (len(exact), BLOCK_TOKENS)).permute(2, 0, 1, 3, 4)
        for side in zip(*found, strict=True)
    )
    return k, v
