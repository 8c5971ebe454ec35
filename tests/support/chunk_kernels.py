"""Chunks for kernels on a GPU, and a kernel on a CPU that loads whole tiles of keys."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.reference import ChunkSpans

TILE = 176  # the widest that FlashAttention 3 loads
QUERIES, KEYS = [1, 37, 300, 64], [1, 700, 300, 65]


def chunk_case(group, dim, dtype, gap):
    """q, k, v and spans of four chunks on a GPU, two of them with history."""
    generator = torch.Generator("cuda").manual_seed(1)
    spans = ChunkSpans.of(QUERIES, KEYS, torch.device("cuda"), gap=gap)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    q = draw(spans.q_ends[-1], 2 * group, dim)
    return q, *(draw(2, spans.num_key_rows, dim) for _ in range(2)), spans


def attend_by_tiles(q: Tensor, k: Tensor, v: Tensor, spans, scores, window) -> Tensor:
    """The result of `tiles_with_lse` alone."""
    return tiles_with_lse(q, k, v, spans, scores, window)[0]


def tiles_with_lse(q: Tensor, k: Tensor, v: Tensor, spans, scores, window) -> tuple[Tensor, Tensor]:
    """Attend as a `fa3.Build` does: by `cu_q` and `cu_k`, causal from the bottom right.

    Every sequence's keys are read to the end of a tile, or of the tensor. What lies past its own
    gets a weight of zero, and its values are multiplied by that. Beside the result it returns the
    log-sum-exp of scores, `[Hq, T]`.
    """
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    left, right = window
    assert right == 0
    group = q.shape[1] // k.shape[1]
    bounds = zip(pairwise(spans.cu_q.tolist()), pairwise(spans.cu_k.tolist()))
    for (q_start, q_end), (k_start, k_end) in bounds:
        if q_start == q_end:
            continue
        length = k_end - k_start
        read = slice(k_start, k_start + -(-length // TILE) * TILE)
        keys, values = (x[read].float().repeat_interleave(group, 1) for x in (k, v))
        found = torch.einsum("thd,lhd->htl", q[q_start:q_end].float(), keys) * scores.scale
        if scores.softcap:
            found = scores.softcap * torch.tanh(found / scores.softcap)
        at = torch.arange(length - (q_end - q_start), length)[:, None] - torch.arange(len(keys))
        hidden = (at < 0) | ((at > left) if left >= 0 else torch.zeros_like(at, dtype=torch.bool))
        found = torch.where(hidden, -torch.inf, found)
        lse[:, q_start:q_end], weights = found.logsumexp(-1), found.softmax(-1)
        out[q_start:q_end] = torch.einsum("htl,lhd->thd", weights, values).to(q.dtype)
    return out, lse
