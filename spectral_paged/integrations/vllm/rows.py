"""vLLM's own pool holds one small block a request: its name in vLLM's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

ROW_BYTES = 256  # of a layer and request
ROW_TOKENS = 128  # a row's number of tokens is a multiple of this


def row_tokens(max_model_len: int) -> int:
    """Return the block size, tokens, with which no request needs a second block."""
    return -(-max_model_len // ROW_TOKENS) * ROW_TOKENS


@register_kv_cache_spec(
    manager_class=FullAttentionManager, uniform_type_base_spec=FullAttentionSpec
)
@dataclass(frozen=True, kw_only=True)
class RowSpec(FullAttentionSpec):
    """One block a request; K and V lie in the arenas of `SpectralKVCache`."""

    @property
    def real_page_size_bytes(self) -> int:
        return ROW_BYTES

    @classmethod
    def merge(cls, specs: Sequence[Self]) -> Self:
        return specs[0]
