"""Run a transformers model over a flattened batch, with attention in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from spectral_paged.cache import SpectralKVCache
from spectral_paged.step import StepPlan

ATTENTION_NAME = "spectral_paged"


def spectral_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spectral_cache: SpectralKVCache,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q `[1, Hq, T, D]`, k and v `[1, Hkv, T, D]`, post RoPE.

    Heads arrive unexpanded; the batch is one flattened row, so there is no mask.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return spectral_cache.attend(module.layer_idx, q, k, v).unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The cache knows who sees what."""
    return None


class ModelRunner:
    """A causal LM whose attention goes through a `SpectralKVCache`."""

    def __init__(self, model: Any, cache: SpectralKVCache) -> None:
        AttentionInterface.register(ATTENTION_NAME, spectral_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.cache = cache
        self.device = cache.device

    @torch.inference_mode()
    def forward(
        self, plan: StepPlan, token_ids: Sequence[int], logit_rows: Sequence[int]
    ) -> Tensor:
        """Logits fp32 `[len(logit_rows), vocab]` of a step between `begin_step` and `end_step`.

        Args:
            token_ids: the step's tokens, flattened in plan order.
            logit_rows: places in the flat batch whose logits are wanted.
        """
        positions = torch.cat([torch.arange(e.start, e.start + e.num_new) for e in plan.entries])
        output = self.model(
            input_ids=torch.tensor([list(token_ids)], device=self.device),
            position_ids=positions.unsqueeze(0).to(self.device),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=torch.tensor(list(logit_rows), device=self.device),
            spectral_cache=self.cache,
        )
        return output.logits[0].float()
