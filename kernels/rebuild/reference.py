"""Rebuilding of K and V from pages into a transient buffer, for chunked prefill, in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_paged.kernels.math.rotary import block_rows, rotate
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, PageLayout
from spectral_paged.kernels.page.view import gather_units, rebuild_side


class PagePlaces(NamedTuple):
    """The places of pages of several sequences, int32 `[num_pages]` each.

    blocks: the number of a page's block in its sequence, which gives its positions.
    rows: the first row of K and V that the page is written to.
    """

    blocks: Tensor
    rows: Tensor


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
    places: PagePlaces | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rebuild K (after RoPE) and V of pages, `[H, tokens, D]` in `dtype`.

    Args: as in `spectral_decode`, for the pages at `units` (int `[num_pages]`; negative ones
        are blocks held exactly and give no tokens). `num_pages`: the number of those that are not
        negative; None counts them, which waits for a GPU. `places`: where pages of any sequences
        belong, of which none is negative then; None: they are blocks 0, 1, ... of one sequence,
        tokens behind each other. `out`: K and V `[H, tokens, D]` to write to; needed with
        `places`.
    """
    entries = (units >= 0).nonzero().squeeze(-1)
    blocks = entries if places is None else places.blocks
    pages = gather_units(plane, units[entries], layout.page_bytes)
    keys = rebuild_side(pages, layout, "k", k_basis)
    values = rebuild_side(pages, layout, "v", v_basis)
    if layout.rope != "post":
        keys = rotate(keys, *block_rows(cos, sin, blocks, first_position, layout.rope))
    k, v = (x.to(dtype).transpose(0, 1).flatten(1, 2) for x in (keys, values))
    if out is None:
        return k, v
    if places is None:
        return out[0].copy_(k), out[1].copy_(v)
    rows = places.rows.long().unsqueeze(-1) + torch.arange(BLOCK_TOKENS, device=units.device)
    out[0][:, rows.flatten()], out[1][:, rows.flatten()] = k, v
    return out
