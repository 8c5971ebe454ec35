"""Attention of prompt chunks on a GPU: kept kernels over variable lengths, none of our own.

```
xformers   where it is installed: fmha with a block-diagonal mask, causal from the bottom right
varlen     torch's variable-length FlashAttention (torch.nn.attention.varlen)
sdpa       a chunk at a time by torch's SDPA: fp32 models, and a torch without the other
```
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels import chunk_attention as twin
from spectral_paged.kernels.chunk_attention import ChunkSpans

HALF_TYPES = (torch.float16, torch.bfloat16)
MAX_DIM = 256  # what FlashAttention takes


@cache
def has_xformers() -> bool:
    """Whether xformers is there with an operator for this GPU: some of its wheels have none."""
    if importlib.util.find_spec("xformers") is None:
        return False
    one = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    try:
        _xformers(one, one, one, ChunkSpans.of([1], [1], one.device), 1.0)
    except (ImportError, NotImplementedError):
        return False
    return True


@cache
def has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def backend(dtype: torch.dtype, dim: int) -> str:
    """What attends to chunks of `dtype` and head width `dim`."""
    if dtype not in HALF_TYPES or dim > MAX_DIM or dim % 8:
        return "sdpa"
    if has_xformers():
        return "xformers"
    return "varlen" if has_varlen() else "sdpa"


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: ChunkSpans,
    scale: float,
    by: str | None = None,
) -> Tensor:
    """`kernels.chunk_attention.chunk_attention` on a GPU: the same arguments; the result has q's
    dtype where a kernel for half precision runs.

    Args:
        by: `xformers`, `varlen` or `sdpa`; None takes what `backend` says.
    """
    name = backend(q.dtype, q.shape[-1]) if by is None else by
    if name == "sdpa":
        return twin.chunk_attention(q, k, v, spans=spans, scale=scale)
    keys, values = (x.transpose(0, 1) for x in (k, v))
    return {"xformers": _xformers, "varlen": _varlen}[name](q, keys, values, spans, scale)


@cache
def _varlen_causal() -> dict[str, Any]:
    """How this torch's `varlen_attn` is asked for a causal mask and for grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    )
    return causal | ({"enable_gqa": True} if "enable_gqa" in names else {})


def _varlen(q: Tensor, k: Tensor, v: Tensor, spans: ChunkSpans, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(
        q, k, v, spans.cu_q, spans.cu_k, max(spans.q_lengths), max(spans.k_lengths),
        scale=scale, **_varlen_causal(),
    )  # fmt: skip
    return found if isinstance(found, Tensor) else found[0]


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _block_diagonal(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: str) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    return BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        list(q_lengths), list(k_lengths), device=device
    )


def _xformers(q: Tensor, k: Tensor, v: Tensor, spans: ChunkSpans, scale: float) -> Tensor:
    from xformers.ops import fmha

    heads = k.shape[1]
    group = q.shape[1] // heads
    queries = q.unflatten(1, (heads, group)).unsqueeze(0)  # [1, T, Hkv, group, D]
    keys, values = (x.unsqueeze(2).expand(-1, -1, group, -1).unsqueeze(0) for x in (k, v))
    bias = _block_diagonal(tuple(spans.q_lengths), tuple(spans.k_lengths), str(q.device))
    out: Tensor = fmha.memory_efficient_attention_forward(
        queries, keys, values, attn_bias=bias, scale=scale
    )
    return out.reshape(q.shape)
