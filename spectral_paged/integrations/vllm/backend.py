"""vLLM's attention backend `CUSTOM`: a layer stores and attends through the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.vllm.passes import Pass
from spectral_paged.integrations.vllm.releases import check_release
from spectral_paged.integrations.vllm.rows import ROW_BYTES

check_release()


class SpectralAttention(AttentionImpl):
    """One layer's attention; `attn_metadata` is a `Pass`, or None while memory is profiled.

    Raises:
        InvalidRequestError: the layer attends in a way that pages do not serve.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Sequence[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        refused = {
            "ALiBi slopes": alibi_slopes,
            "a K and V shared with another layer": kv_sharing_target_layer_name,
            "attention sinks": extra.get("sinks"),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
        }
        for what, given in refused.items():
            if given is not None and given is not False:
                raise InvalidRequestError(
                    f"the model's attention has {what}, which pages do not serve: take a model of "
                    "another family, or vLLM's own cache"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap or None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Pass | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend the real tokens of a batch that may be padded; q and output `[T, Hq, D]`."""
        if attn_metadata is None or not attn_metadata.num_tokens:
            return output.zero_()
        real = slice(attn_metadata.num_tokens)
        found = attn_metadata.attend(layer.spectral_layer, query[real], key[real], value[real])
        output[real].copy_(found.view_as(output[real]))
        return output


class StubBuilder(AttentionMetadataBuilder[Any]):
    """Tells vLLM which steps may be CUDA graphs; `SpectralModelState` makes the metadata."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        raise NotImplementedError("SpectralModelState.prepare_attn makes a step's metadata")


class SpectralBackend(AttentionBackend):
    """The backend of every layer; vLLM's own tensors hold rows that nothing reads."""

    accept_output_buffer = True
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # `Attention` looks its member of the registry up by this

    @staticmethod
    def get_impl_cls() -> type[SpectralAttention]:
        return SpectralAttention

    @staticmethod
    def get_builder_cls() -> type[StubBuilder]:
        return StubBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return num_blocks, 1, 1, ROW_BYTES

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False
