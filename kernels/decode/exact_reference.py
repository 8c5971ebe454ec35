"""Decode attention over exact pages: landmarks and tail, or the whole sequence in `exact`."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.exact.reference import exact_gather
from spectral_paged.kernels.math.scores import capped


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
    """One query per sequence against its exact tokens. The fp32 torch twin.

    Args:
        q: `[N, Hq, D]`, after RoPE.
        plane: uint8, one layer's plane; pages hold `dtype`.
        table: int `[N, max_pages]` in 128-byte units; entries past the end are never read.
        num_tokens: int `[N]`, exact tokens of each sequence, the query's own among them.
        softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
        first_visible: int `[N]`, tokens before this one, counted in the sequence's exact pages, are
            not seen (a sliding window); None sees all.

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
