"""Memory-efficient attention of xformers, causal from the bottom right of each chunk."""

from __future__ import annotations

import importlib.util
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.chunk.reference import ChunkSpans, with_gaps
from spectral_paged.kernels.math.scores import Scores


@cache
def _has_operator() -> bool:
    """True if xformers has an operator for this GPU; some of its wheels have none."""
    if importlib.util.find_spec("xformers") is None or not torch.cuda.is_available():
        return False
    one = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    try:
        attend(one, one, one, ChunkSpans.of([1], [1], one.device), Scores(1.0), None)
    except (ImportError, NotImplementedError):
        return False
    return True


def obstacle(kind: ChunkKind) -> str | None:
    if kind.device.type != "cuda" or not _has_operator():
        return "is not installed, or has no operator for this GPU"
    if kind.softcap is not None:
        return "has no soft cap"
    if kind.has_sinks:
        return "gives each kernel's log-sum-exp in a shape of its own, and sinks need it"
    return kind.flash_obstacle()


@lru_cache(maxsize=8)  # the same for all layers of a step
def _block_diagonal(
    q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: str, window: int | None
) -> Any:
    from xformers.ops.fmha.attn_bias import (
        BlockDiagonalCausalFromBottomRightMask,
        BlockDiagonalMask,
    )

    kind = BlockDiagonalCausalFromBottomRightMask if window is None else BlockDiagonalMask
    mask = kind.from_seqlens(list(q_lengths), list(k_lengths), device=device)
    return mask if window is None else mask.make_local_attention_from_bottomright(window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: ChunkSpans,
    scores: Scores,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    assert sinks is None, "obstacle was asked"
    from xformers.ops import fmha

    heads = k.shape[1]
    group = q.shape[1] // heads
    queries = q.unflatten(1, (heads, group)).unsqueeze(0)  # [1, T, Hkv, group, D]
    keys, values = (x.unsqueeze(2).expand(-1, -1, group, -1).unsqueeze(0) for x in (k, v))
    q_lengths, k_lengths = spans.q_lengths, spans.k_lengths
    if spans.gap:
        q_lengths, k_lengths = with_gaps(q_lengths, 0), with_gaps(k_lengths, spans.gap)
    bias = _block_diagonal(tuple(q_lengths), tuple(k_lengths), str(q.device), window)
    out: Tensor = fmha.memory_efficient_attention_forward(
        queries, keys, values, attn_bias=bias, scale=scores.scale
    )
    return out.reshape(q.shape)
