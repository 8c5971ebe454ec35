"""cuDNN's fused attention through torch, a chunk at a time.

Torch's causal mask is aligned at the top left, so a chunk with history attends twice, to its
history without a mask and to its own tokens with it, and the two are merged. cuDNN prepares a plan
for each pair of lengths when that first comes up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.backend import ChunkKind, capability
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.math.scores import Scores, merge, with_sinks

MAX_DIM = 128  # wider heads depend on the release


def obstacle(kind: ChunkKind) -> str | None:
    if capability(kind.device) < (8, 0) or not torch.backends.cudnn.is_available():
        return "needs cuDNN and a GPU of compute capability 8.0 or newer"
    if kind.softcap is not None:
        return "has no soft cap"
    if kind.window is not None:
        return "has no windows through torch"
    if kind.dim > MAX_DIM:
        return f"takes heads of up to {MAX_DIM} here, not {kind.dim}"
    return kind.flash_obstacle()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: ChunkSpans,
    scores: Scores,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for queries, keys in spans:
        own = keys.stop - (queries.stop - queries.start)
        past, now = slice(keys.start, own), slice(own, keys.stop)
        parts = [(now, True)] if past.start == past.stop else [(past, False), (now, True)]
        with_lse = len(parts) > 1 or sinks is not None
        found = [
            _fused(q[queries], k[part], v[part], scores.scale, causal, with_lse)
            for part, causal in parts
        ]
        result, lse = found[0]
        if len(found) > 1:
            outs, lses = zip(*found, strict=True)
            result, lse = merge([x.float() for x in outs], list(lses))
        out[queries] = result if sinks is None else with_sinks(result, lse, sinks)
    return out


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """Attention of `[n, Hq, D]` to `[L, Hkv, D]`: `[n, Hq, D]`, and its log-sum-exp `[n, Hq]`."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        None,
        with_lse,
        is_causal=causal,
        scale=scale,
    )
    num_heads, num_queries = q.shape[1], q.shape[0]
    return out[0].transpose(0, 1), lse.view(num_heads, num_queries).T if with_lse else lse
