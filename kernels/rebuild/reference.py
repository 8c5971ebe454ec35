"""Rebuilding of K and V from pages into a transient buffer, for chunked prefill, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.math.rotary import block_rows, rotate
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.view import gather_units, rebuild_side


def spectral_rebuild(
    plane: Tensor,
    units: Tensor,
    *,
    layout: PageLayout,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype,
    k_basis: Tensor | None = None,
    v_basis: Tensor | None = None,
    num_pages: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rebuild K (after RoPE) and V of one sequence's pages, `[H, tokens, D]` in `dtype`.

    Args: as in `spectral_decode`, for the pages at `units` (int `[num_pages]`; negative ones
        are blocks held exactly and give no tokens). `num_pages`: the number of those that are not
        negative; None counts them, which waits for a GPU. `out`: K and V `[H, tokens, D]` to write
        to, tokens behind each other.
    """
    blocks = (units >= 0).nonzero().squeeze(-1)
    pages = gather_units(plane, units[blocks], layout.page_bytes)
    keys = rebuild_side(pages, layout, "k", k_basis)
    values = rebuild_side(pages, layout, "v", v_basis)
    if layout.rope != "post":
        keys = rotate(keys, *block_rows(cos, sin, blocks, first_position, layout.rope))
    k, v = (x.to(dtype).transpose(0, 1).flatten(1, 2) for x in (keys, values))
    return (k, v) if out is None else (out[0].copy_(k), out[1].copy_(v))
