"""Typed views into page bytes: the one place that turns a `PageLayout` into tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_paged.kernels.layout import BLOCK_TOKENS, COEFF_OFFSET, UNIT_BYTES, PageLayout


class SideView(NamedTuple):
    """Writable views of one side of `N` pages with `H` heads; they share the pages' memory."""

    coeff: Tensor  # uint8 [N, H, 512, rank]
    basis: Tensor  # uint8 [N, H, rank, D]
    scale: Tensor  # fp32  [N, H, rank]
    mean: Tensor | None  # fp16  [N, H, D]


def side_view(pages: Tensor, layout: PageLayout, side: str) -> SideView:
    """Views of the K (`side="k"`) or V sections of `pages`, uint8 `[N, page_bytes]`."""
    part = layout.k if side == "k" else layout.v
    heads = pages.view(-1, layout.num_kv_heads, layout.head_bytes)
    rank, dim = part.rank, layout.head_dim

    def section(offset: int, num_bytes: int) -> Tensor:
        return heads[..., offset : offset + num_bytes]

    mean = None
    if part.mean_offset >= 0:
        mean = section(part.mean_offset, 2 * dim).view(torch.float16)
    return SideView(
        coeff=section(part.coeff_offset, BLOCK_TOKENS * rank).unflatten(-1, (BLOCK_TOKENS, rank)),
        basis=section(part.basis_offset, rank * dim).unflatten(-1, (rank, dim)),
        scale=section(part.scale_offset, 4 * rank).view(torch.float32),
        mean=mean,
    )


def centred(codes: Tensor) -> Tensor:
    """Stored uint8 codes as fp32 integers in -128..127."""
    return codes.float() - COEFF_OFFSET


def rebuild_side(pages: Tensor, layout: PageLayout, side: str) -> Tensor:
    """fp32 `[N, H, 512, D]`: mean + (C * scale) B, keys as they were stored (pre or post RoPE)."""
    view = side_view(pages, layout, side)
    basis = centred(view.basis) * view.scale.unsqueeze(-1)
    rebuilt = centred(view.coeff) @ basis
    return rebuilt if view.mean is None else rebuilt + view.mean.float().unsqueeze(-2)


def gather_units(plane: Tensor, positions: Tensor, num_bytes: int) -> Tensor:
    """Copy `num_bytes` from each position (128-byte units) of a uint8 plane: `[N, num_bytes]`."""
    units = torch.arange(num_bytes // UNIT_BYTES, device=plane.device)
    rows = plane.view(-1, UNIT_BYTES)[positions.long().unsqueeze(-1) + units]
    return rows.view(positions.shape[0], num_bytes)
