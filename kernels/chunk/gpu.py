"""Attention of prompt chunks on a GPU, by kernels of libraries for variable lengths.

```
xformers   where it is installed: fmha with a block-diagonal mask, causal from the bottom right
varlen     torch's variable-length FlashAttention (torch.nn.attention.varlen)
sdpa       a chunk at a time by torch's SDPA: fp32 models, and a torch without the other
math       products and softmax by themselves: soft-capped scores, which no kept kernel has
```
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.chunk import reference as twin
from spectral_paged.kernels.chunk.reference import ChunkSpans

HALF_TYPES = (torch.float16, torch.bfloat16)
MAX_DIM = 256  # the widest head that FlashAttention takes


@cache
def has_xformers() -> bool:
    """Return whether xformers has an operator for this GPU; some of its wheels have none."""
    if importlib.util.find_spec("xformers") is None:
        return False
    one = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    try:
        _xformers(one, one, one, ChunkSpans.of([1], [1], one.device), 1.0, None)
    except (ImportError, NotImplementedError):
        return False
    return True


@cache
def has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@cache
def _varlen_slides() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def backend(
    dtype: torch.dtype, dim: int, *, softcap: float | None = None, window: int | None = None
) -> str:
    """The name of the backend that attends to chunks of `dtype` and head width `dim`."""
    if softcap is not None:
        return "math"
    if dtype not in HALF_TYPES or dim > MAX_DIM or dim % 8:
        return "sdpa"
    if has_xformers():
        return "xformers"
    return "varlen" if has_varlen() and (window is None or _varlen_slides()) else "sdpa"


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: ChunkSpans,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    by: str | None = None,
) -> Tensor:
    """`chunk.reference.chunk_attention` on a GPU: the same arguments; the result has q's
    dtype where a kernel for half precision runs.

    Args:
        by: `xformers`, `varlen`, `sdpa` or `math`; None takes the choice of `backend`.

    Raises:
        ValueError: `softcap` with a kernel that has no cap.
    """
    name = by or backend(q.dtype, q.shape[-1], softcap=softcap, window=window)
    if name in ("sdpa", "math"):
        return twin.chunk_attention(
            q, k, v, spans=spans, scale=scale, softcap=softcap, window=window
        )
    if softcap is not None:
        raise ValueError(f"{name} has no softcap: use by='math'")
    keys, values = (x.transpose(0, 1) for x in (k, v))
    return {"xformers": _xformers, "varlen": _varlen}[name](q, keys, values, spans, scale, window)


@cache
def _varlen_causal(window: int | None) -> dict[str, Any]:
    """The arguments with which this torch's `varlen_attn` masks causally and groups heads."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    left = -1 if window is None else window - 1
    causal: dict[str, Any] = {"window_size": (left, 0)} if _varlen_slides() else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in names else {})


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, spans: ChunkSpans, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(
        q,
        k,
        v,
        spans.cu_q,
        spans.cu_k,
        max(spans.q_lengths),
        max(spans.k_lengths),
        scale=scale,
        **_varlen_causal(window),
    )
    return found if isinstance(found, Tensor) else found[0]


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


def _xformers(
    q: Tensor, k: Tensor, v: Tensor, spans: ChunkSpans, scale: float, window: int | None
) -> Tensor:
    from xformers.ops import fmha

    heads = k.shape[1]
    group = q.shape[1] // heads
    queries = q.unflatten(1, (heads, group)).unsqueeze(0)  # [1, T, Hkv, group, D]
    keys, values = (x.unsqueeze(2).expand(-1, -1, group, -1).unsqueeze(0) for x in (k, v))
    bias = _block_diagonal(tuple(spans.q_lengths), tuple(spans.k_lengths), str(q.device), window)
    out: Tensor = fmha.memory_efficient_attention_forward(
        queries, keys, values, attn_bias=bias, scale=scale
    )
    return out.reshape(q.shape)
