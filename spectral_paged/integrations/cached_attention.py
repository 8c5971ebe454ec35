"""The attention that transformers models take to read a `SpectralPagedCache`.

`ATTENTION_NAME` is registered when this module is imported. Forwards without such a cache (stock
caches, training) run torch's SDPA under it.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "spectral_paged_cache"
CACHE_OPTION = "spectral_paged_cache"  # the keyword by which a forward's cache reaches attention


class AttendingCache(Protocol):
    """What attends in place of SDPA."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """q `[B, Hq, T, D]`, k and v `[B, Hkv, T, D]` of the new columns; `[B, T, Hq, D]`."""
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
    """transformers' attention interface; the cache knows positions and padding, so its mask is
    not read."""
    if spectral_paged_cache is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    return spectral_paged_cache.attend(module.layer_idx, query, key, value), None


AttentionInterface.register(ATTENTION_NAME, cached_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
