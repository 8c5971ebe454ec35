"""Decode attention straight from spectral pages; K and V never exist in memory as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.layout import BLOCK_TOKENS, PageLayout
from spectral_paged.kernels.page_view import centred, gather_units, rebuild_side, side_view
from spectral_paged.kernels.rotary import rotate


def spectral_decode(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    num_pages: Tensor,
    *,
    layout: PageLayout,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query per sequence against its sealed blocks. The fp32 torch twin.

    K post-RoPE: q is projected into rank space once per page, then only coefficients are read.
    K pre-RoPE: the tile is rebuilt and rotated. V always: P C in rank space, then B once a page.

    Args:
        q: `[N, Hq, D]`, after RoPE.
        plane: uint8, one layer's plane.
        table: int `[N, max_pages]` in 128-byte units; entries past `num_pages` are never read.
        num_pages: int `[N]`.
        first_position: position of the first token of block 0 (the number of landmarks).
        cos, sin: fp32 `[max_positions, rotary_dim / 2]`, the model's own table.

    Returns:
        out fp32 `[N, Hq, D]` and lse fp32 `[N, Hq]`; zeros and -inf for a sequence without pages.
    """
    num_seqs, num_q_heads, dim = q.shape
    heads = layout.num_kv_heads
    out = q.new_zeros((num_seqs, num_q_heads, dim), dtype=torch.float32)
    lse = q.new_full((num_seqs, num_q_heads), float("-inf"), dtype=torch.float32)
    grouped = q.float().view(num_seqs, heads, -1, dim) * scale
    for i, count in enumerate(num_pages.tolist()):
        if count == 0:
            continue
        pages = gather_units(plane, table[i, :count], layout.page_bytes)
        query = grouped[i]  # [H, G, D]
        if layout.rotate_keys:
            keys = rebuild_side(pages, layout, "k")  # [P, H, 512, D]
            span = slice(first_position, first_position + count * BLOCK_TOKENS)
            keys = rotate(
                keys,
                cos[span].view(count, 1, BLOCK_TOKENS, -1),
                sin[span].view(count, 1, BLOCK_TOKENS, -1),
            )
            scores = query @ keys.transpose(-1, -2)  # [P, H, G, 512]
        else:
            view = side_view(pages, layout, "k")
            projected = query @ (centred(view.basis) * view.scale.unsqueeze(-1)).transpose(-1, -2)
            scores = projected @ centred(view.coeff).transpose(-1, -2)
            if view.mean is not None:
                scores = scores + query @ view.mean.float().unsqueeze(-1)
        row_lse = torch.logsumexp(torch.logsumexp(scores, dim=-1), dim=0)  # [H, G]
        weights = torch.exp(scores - row_lse.unsqueeze(-1))
        view = side_view(pages, layout, "v")
        in_rank = weights @ centred(view.coeff) * view.scale.unsqueeze(-2)  # [P, H, G, rank]
        result = in_rank @ centred(view.basis)
        if view.mean is not None:
            result = result + weights.sum(-1, keepdim=True) * view.mean.float().unsqueeze(-2)
        out[i] = result.sum(0).view(num_q_heads, dim)
        lse[i] = row_lse.flatten()
    return out, lse
