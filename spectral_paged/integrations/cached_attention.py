"""The attention function by which transformers models read a `SpectralPagedCache`.

Importing this module registers it as `ATTENTION_NAME`. In forwards without such a cache (stock
caches, training) it runs torch's SDPA, or the model's eager attention where scores are capped or
have sinks, because SDPA has neither.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spectral_paged.models.attention_choice import register_attention

CACHE_OPTION = "spectral_paged_cache"  # the keyword by which a forward's cache reaches attention


class AttendingCache(Protocol):
    """A cache that attends in place of SDPA."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend with q `[B, Hq, T, D]`, k, v `[B, Hkv, T, D]` of new columns, and sinks `[Hq]`;
        `[B, T, Hq, D]`."""
        ...


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spectral_paged_cache: AttendingCache | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, with the cache of the forward if it has one.

    The cache knows positions and padding, so it ignores `attention_mask`.
    """
    if spectral_paged_cache is not None:
        sinks = options.get("s_aux")
        return spectral_paged_cache.attend(module.layer_idx, query, key, value, sinks), None
    if options.get("softcap") is None and options.get("s_aux") is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    eager = sys.modules[type(module).__module__].eager_attention_forward
    mask = _added(attention_mask, query, key)
    return eager(module, query, key, value, mask, **options)[0], None


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """SDPA's mask as the one that eager attention adds to scores.

    SDPA's is bool, or None for causal queries that are the newest keys.
    """
    length, seen = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(length, seen, dtype=torch.bool, device=key.device).tril(seen - length)
    added = torch.zeros(mask.shape, dtype=query.dtype, device=key.device)
    return added.masked_fill(~mask, torch.finfo(query.dtype).min)


ATTENTION_NAME = register_attention("spectral_paged_cache", cached_attention, mask=sdpa_mask)
