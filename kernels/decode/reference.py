"""Decode attention to a sequence's exact tokens and sealed blocks, in fp32: the torch twins.

```
exact_decode       landmarks and tail, or the whole sequence in `exact`
spectral_decode    sealed blocks, straight from their pages; K and V never exist as a whole
decode_attention   both, merged
```
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.decode.batch import Basis, ExactTokens, Pages
from spectral_paged.kernels.decode.shared_pages import SharedPages, check_no_window
from spectral_paged.kernels.exact.reference import exact_gather
from spectral_paged.kernels.math.rotary import block_rows, rotate
from spectral_paged.kernels.math.scores import Scores, capped, merge, with_sinks
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, PageLayout
from spectral_paged.kernels.page.view import gather_units, rebuild_side, side_view, slot_tokens


def decode_attention(
    q: Tensor,
    plane: Tensor,
    exact: ExactTokens,
    pages: Pages | None,
    scores: Scores,
    basis: Basis,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence to its exact tokens and its sealed blocks.

    Args:
        q: `[N, Hq, D]`, after RoPE.
        plane: uint8, one layer's plane.
        pages: None where no sequence has any.
        sinks: `[Hq]`, a score of each head that adds to the sum of weights and has no value
            (gpt-oss); None: there are none.

    Returns:
        `[N, Hq, D]` in q's dtype; zeros for a sequence without tokens.
    """
    out, lse = exact_decode(
        q,
        plane,
        exact.table,
        exact.counts,
        num_kv_heads=exact.num_kv_heads,
        scale=scores.scale,
        dtype=exact.dtype,
        softcap=scores.softcap,
        first_visible=exact.first_visible,
    )
    if pages is not None:
        other, other_lse = spectral_decode(
            q,
            plane,
            pages.table,
            pages.counts,
            layout=pages.layout,
            first_position=pages.rotation.first_position,
            cos=pages.rotation.cos,
            sin=pages.rotation.sin,
            scale=scores.scale,
            k_basis=basis.k,
            v_basis=basis.v,
            softcap=scores.softcap,
            first_visible=pages.first_visible,
            shared=pages.shared,
        )
        out, lse = merge([out, other], [lse, other_lse])
    if sinks is not None:
        out = with_sinks(out, lse, sinks)
    return out.to(q.dtype)


def exact_decode(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    num_tokens: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    dtype: torch.dtype,
    softcap: float | None = None,
    first_visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence to its exact tokens.

    Args:
        q: `[N, Hq, D]`, after RoPE.
        plane: uint8, one layer's plane; pages hold `dtype`.
        table: int `[N, max_pages]` in 128-byte units; entries past the end are never read.
        num_tokens: int `[N]`, exact tokens of each sequence, the query's own among them.
        softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
        first_visible: int `[N]`, the first token that each query sees, counted in the sequence's
            exact pages (a sliding window); None sees all.

    Returns:
        out fp32 `[N, Hq, D]` and lse fp32 `[N, Hq]`; zeros and -inf for a sequence without tokens.
    """
    num_seqs, num_q_heads, dim = q.shape
    out = q.new_zeros((num_seqs, num_q_heads, dim), dtype=torch.float32)
    lse = q.new_full((num_seqs, num_q_heads), float("-inf"), dtype=torch.float32)
    grouped = q.float().view(num_seqs, num_kv_heads, -1, dim) * scale
    for i, count in enumerate(num_tokens.tolist()):
        if count == 0:
            continue
        k, v = exact_gather(plane, table[i], count, num_kv_heads, dim, dtype)
        hidden = 0 if first_visible is None else int(first_visible[i])
        if hidden >= count:
            continue
        scores = grouped[i] @ k.float().transpose(-1, -2)  # [H, G, tokens]
        scores = capped(scores, softcap)
        scores[..., :hidden] = float("-inf")
        lse[i] = torch.logsumexp(scores, dim=-1).flatten()
        out[i] = (torch.softmax(scores, dim=-1) @ v.float()).view(num_q_heads, dim)
    return out, lse


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
    k_basis: Tensor | None = None,
    v_basis: Tensor | None = None,
    softcap: float | None = None,
    first_visible: Tensor | None = None,
    shared: SharedPages | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence to its sealed blocks.

    Keys stored after RoPE: q is projected into rank space once a page, and only coefficients are
    read. Other keys are rebuilt and turned, by their own position (`pre`) or with their frame.
    Values in every format: P C in rank space, then B once a page.

    Args:
        q: `[N, Hq, D]`, after RoPE.
        plane: uint8, one layer's plane.
        table: int `[N, max_pages]` in 128-byte units; entries past `num_pages` are never read.
        num_pages: int `[N]`, table entries to visit; a negative entry is a block held exactly and
            is skipped.
        first_position: position of the first token of block 0 (the number of landmarks).
        cos, sin: fp32 `[max_positions, rotary_dim / 2]`, the model's own table.
        k_basis, v_basis: `[H, rank, D]`, the layer's basis where the format shares it.
        softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
        first_visible: int `[N]`, the first position that each query sees (a sliding window); None
            sees all.
        shared: the pages that tiles of sequences read; None: each reads all of its own.

    Returns:
        out fp32 `[N, Hq, D]` and lse fp32 `[N, Hq]`; zeros and -inf for a sequence without pages.

    Raises:
        ValueError: both `shared` and `first_visible`.
    """
    if shared is not None:
        check_no_window(first_visible)
        own = table.clone()
        entry = torch.arange(table.shape[1], device=table.device)
        own[entry < shared.starts.unsqueeze(-1)] = -1  # its tile reads it
        found = [
            spectral_decode(
                *part,
                layout=layout,
                first_position=first_position,
                cos=cos,
                sin=sin,
                scale=scale,
                k_basis=k_basis,
                v_basis=v_basis,
                softcap=softcap,
            )
            for part in (
                (q, plane, own, num_pages),
                (shared.queries(q), plane, shared.table, shared.counts),
            )
        ]
        (out, lse), (of_tiles, tiles_lse) = found
        outs = [out, shared.by_sequence(of_tiles, 0.0)]
        return merge(outs, [lse, shared.by_sequence(tiles_lse, float("-inf"))])
    num_seqs, num_q_heads, dim = q.shape
    heads = layout.num_kv_heads
    out = q.new_zeros((num_seqs, num_q_heads, dim), dtype=torch.float32)
    lse = q.new_full((num_seqs, num_q_heads), float("-inf"), dtype=torch.float32)
    grouped = q.float().view(num_seqs, heads, -1, dim) * scale
    for i, count in enumerate(num_pages.tolist()):
        if count == 0:
            continue
        blocks = (table[i, :count] >= 0).nonzero().squeeze(-1)
        if not len(blocks):
            continue
        pages = gather_units(plane, table[i][blocks], layout.page_bytes)
        query = grouped[i]  # [H, G, D]
        if layout.rope != "post":
            keys = rebuild_side(pages, layout, "k", k_basis)  # [P, H, 512, D]
            rows = block_rows(cos, sin, blocks, first_position, layout.rope)
            keys = rotate(keys, *rows)
            scores = query @ keys.transpose(-1, -2)  # [P, H, G, 512]
        else:
            scores = _scores_in_rank_space(query, pages, layout, k_basis)
        scores = capped(scores, softcap)
        if first_visible is not None:
            place = torch.arange(BLOCK_TOKENS, device=q.device)
            positions = first_position + blocks.unsqueeze(-1) * BLOCK_TOKENS + place
            hidden = positions < first_visible[i]  # [P, 512]
            if bool(hidden.all()):
                continue
            scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        row_lse = torch.logsumexp(torch.logsumexp(scores, dim=-1), dim=0)  # [H, G]
        weights = torch.exp(scores - row_lse.unsqueeze(-1))
        out[i] = _weighted_values(weights, pages, layout, v_basis).sum(0).view(num_q_heads, dim)
        lse[i] = row_lse.flatten()
    return out, lse


def _scores_in_rank_space(
    query: Tensor, pages: Tensor, layout: PageLayout, shared: Tensor | None
) -> Tensor:
    """Scores `[P, H, G, 512]` of scaled queries `[H, G, D]` and keys stored after RoPE."""
    view = side_view(pages, layout, "k")
    projected = query @ view.basis(shared).transpose(-1, -2)
    scores = projected @ view.coefficients().transpose(-1, -2)
    if view.mean is not None:
        scores = scores + query @ view.mean.float().unsqueeze(-1)
    if view.slots is not None:
        exact = query @ view.slots.float().transpose(-1, -2)  # [P, H, G, slots]
        scores = scores.scatter(-1, _slot_index(pages, layout, exact), exact)
    return scores


def _weighted_values(
    weights: Tensor, pages: Tensor, layout: PageLayout, shared: Tensor | None
) -> Tensor:
    """`weights` `[P, H, G, 512]` times the values of each page: `[P, H, G, D]`."""
    view = side_view(pages, layout, "v")
    exact: Tensor | float = 0.0
    if view.slots is not None:
        index = _slot_index(pages, layout, weights[..., : layout.num_slots])
        exact = weights.gather(-1, index) @ view.slots.float()
        weights = weights.scatter(-1, index, 0.0)
    result = (weights @ view.coefficients()) @ view.basis(shared) + exact
    if view.mean is not None:
        result = result + weights.sum(-1, keepdim=True) * view.mean.float().unsqueeze(-2)
    return result


def _slot_index(pages: Tensor, layout: PageLayout, like: Tensor) -> Tensor:
    """The outlier tokens `[P, H, slots]`, expanded over the query heads of `like`."""
    return slot_tokens(pages, layout).long().unsqueeze(-2).expand_as(like)
