"""Decode attention over all that a sequence has: landmarks, pages and tail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.decode.exact_reference import exact_decode
from spectral_paged.kernels.decode.pages_reference import spectral_decode
from spectral_paged.kernels.math.merge import merge
from spectral_paged.kernels.page.layout import PageLayout


def decode_attention(
    q: Tensor,
    plane: Tensor,
    exact_table: Tensor,
    num_tokens: Tensor,
    page_table: Tensor | None,
    num_pages: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    dtype: torch.dtype,
    layout: PageLayout | None,
    first_position: int,
    cos: Tensor,
    sin: Tensor,
    k_basis: Tensor | None = None,
    v_basis: Tensor | None = None,
    softcap: float | None = None,
    first_exact: Tensor | None = None,
    first_visible: Tensor | None = None,
) -> Tensor:
    """One query per sequence against its exact tokens and its sealed blocks. The fp32 torch twin.

    Args:
        q: `[N, Hq, D]`, after RoPE.
        plane: uint8, one layer's plane; exact pages hold `dtype`.
        exact_table, num_tokens: as `exact_decode` takes them.
        page_table, num_pages, layout: as `spectral_decode` takes them; no table where no sequence
            has pages, no layout where the format has none.
        softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
        first_exact, first_visible: of a sliding window, int `[N]`: the first token that each query
            sees, counted in the sequence's exact pages, and as a position; None sees all.

    Returns:
        `[N, Hq, D]` in q's dtype; zeros for a sequence without tokens.
    """
    out, lse = exact_decode(
        q,
        plane,
        exact_table,
        num_tokens,
        num_kv_heads=num_kv_heads,
        scale=scale,
        dtype=dtype,
        softcap=softcap,
        first_visible=first_exact,
    )
    if page_table is not None and layout is not None:
        rows: dict[str, Any] = {"k_basis": k_basis, "v_basis": v_basis}
        other, other_lse = spectral_decode(
            q,
            plane,
            page_table,
            num_pages,
            layout=layout,
            first_position=first_position,
            cos=cos,
            sin=sin,
            scale=scale,
            softcap=softcap,
            first_visible=first_visible,
            **rows,
        )
        out = merge([out, other], [lse, other_lse])[0]
    return out.to(q.dtype)
