"""Rebuild history K and V from pages into a transient buffer, for chunked prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.layout import BLOCK_TOKENS, PageLayout
from spectral_paged.kernels.page_view import gather_units, rebuild_side
from spectral_paged.kernels.rotary import rotate


def spectral_rebuild(
    plane: Tensor,
    positions: Tensor,
    *,
    layout: PageLayout,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """K (after RoPE) and V of one sequence's pages, `[H, num_pages * 512, D]` in `dtype`.

    Args: as in `spectral_decode`, for the pages at `positions` (int `[num_pages]`).
    """
    num_pages = positions.shape[0]
    pages = gather_units(plane, positions, layout.page_bytes)
    keys, values = rebuild_side(pages, layout, "k"), rebuild_side(pages, layout, "v")
    if layout.rotate_keys:
        span = slice(first_position, first_position + num_pages * BLOCK_TOKENS)
        keys = rotate(
            keys,
            cos[span].view(num_pages, 1, BLOCK_TOKENS, -1),
            sin[span].view(num_pages, 1, BLOCK_TOKENS, -1),
        )
    return (
        keys.to(dtype).transpose(0, 1).flatten(1, 2),
        values.to(dtype).transpose(0, 1).flatten(1, 2),
    )
