"""Torch's attention over variable lengths, by FlashAttention 2 (`torch.nn.attention.varlen`)."""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

from torch import Tensor

from spectral_paged.kernels.chunk.backend import ChunkKind, capability
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.math.scores import Scores, with_sinks


@cache
def _parameters() -> frozenset[str]:
    """The parameters of this torch's `varlen_attn`, which grow from release to release; none if it
    has no such function."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def obstacle(kind: ChunkKind) -> str | None:
    if capability(kind.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if not _parameters():
        return "is not in this torch"
    if kind.softcap is not None:
        return "has no soft cap"
    if kind.window is not None and "window_size" not in _parameters():
        return "has no windows in this torch"
    if kind.has_sinks and "return_aux" not in _parameters():
        return "gives no log-sum-exp in this torch, which sinks need"
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
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in _parameters():
        options = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _parameters():
        options["enable_gqa"] = True
    if sinks is not None:
        from torch.nn.attention.varlen import AuxRequest

        options["return_aux"] = AuxRequest(lse=True)
    lengths = spans.cu_q, spans.cu_k, spans.max_q, spans.max_k
    found = varlen_attn(q, k, v, *lengths, scale=scores.scale, **options)
    out: Tensor = found if isinstance(found, Tensor) else found[0]
    return out if sinks is None else with_sinks(out, found[1].T, sinks)  # lse `[Hq, T]`
