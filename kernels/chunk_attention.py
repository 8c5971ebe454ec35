"""Attention of one sequence's prompt chunk over its history and itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_TILE = 256


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Causal attention, aligned at the bottom right: the last query sees every key.

    Grouped-query heads ride as extra query rows, so K and V are never expanded. Queries go in
    tiles, so the mask stays small. Softmax accumulates in fp32.

    Args:
        q: `[T, Hq, D]` after RoPE.
        k, v: `[Hkv, L, D]` with L >= T; the last T are the chunk's own.

    Returns:
        fp32 `[T, Hq, D]`.
    """
    num_tokens, num_q_heads, dim = q.shape
    num_kv_heads, length, _ = k.shape
    group = num_q_heads // num_kv_heads
    out = q.new_empty((num_tokens, num_q_heads, dim), dtype=torch.float32)
    keys, values = k.float().unsqueeze(0), v.float().unsqueeze(0)
    for start in range(0, num_tokens, QUERY_TILE):
        end = min(start + QUERY_TILE, num_tokens)
        seen = length - num_tokens + end
        tile = q[start:end].float().view(end - start, num_kv_heads, group, dim)
        rows = tile.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * (end - start), dim)
        columns = torch.arange(seen, device=q.device)
        limit = torch.arange(seen - (end - start), seen, device=q.device)
        mask = (columns <= limit.unsqueeze(-1)).repeat(group, 1)
        result = F.scaled_dot_product_attention(
            rows, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask, scale=scale
        )
        result = result.view(num_kv_heads, group, end - start, dim)
        out[start:end] = result.permute(2, 0, 1, 3).reshape(end - start, num_q_heads, dim)
    return out
