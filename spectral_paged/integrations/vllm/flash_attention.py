"""FlashAttention 3 as vLLM brings it attends to prompt chunks inside vLLM."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from vllm.vllm_flash_attn import fa_version_unsupported_reason, flash_attn_varlen_func

from spectral_paged.kernels.chunk.fa3 import Build, use_build
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.math.scores import Scores

logger = logging.getLogger("vllm.spectral_paged")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: ChunkSpans,
    scores: Scores,
    window: tuple[int, int],
) -> Tensor:
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        max_seqlen_q=spans.max_q,
        cu_seqlens_q=spans.cu_q,
        max_seqlen_k=spans.max_k,
        cu_seqlens_k=spans.cu_k,
        softmax_scale=scores.scale,
        causal=True,
        window_size=list(window),
        softcap=scores.softcap or 0.0,
        num_splits=1,
        fa_version=3,
    )
    return out


BUILD = Build("vLLM", _attend, (torch.bfloat16, torch.float16))


def use_vllm_build() -> None:
    """Attend to chunks by vLLM's FlashAttention 3, where it has it for this GPU."""
    reason = fa_version_unsupported_reason(3)
    if reason is None:
        use_build(BUILD)
    else:
        logger.info("pages: prompt chunks attend without FlashAttention 3 (%s)", reason)
