"""The ops by torch, in fp32: what runs on a CPU, and what kernels are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.reference import chunk_attention
from spectral_paged.kernels.decode.reference import decode_attention
from spectral_paged.kernels.exact.reference import exact_append
from spectral_paged.kernels.ops.protocol import SealKernel
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.rebuild.reference import spectral_rebuild
from spectral_paged.kernels.seal.eigenvectors import eigenvectors


class TorchOps:
    """Every op by its twin; there is nothing to plan and nothing to compile."""

    def exact_append(
        self, k: Tensor, v: Tensor, plane: Tensor, positions: Tensor, offsets: Tensor
    ) -> None:
        exact_append(k, v, plane, positions, offsets)

    def decode_attention(self, *args: Any, **options: Any) -> Tensor:
        return decode_attention(*args, **options)

    def spectral_rebuild(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return spectral_rebuild(*args, **options)

    def compile_rebuild(self, *args: Any, **options: Any) -> None:
        pass

    def chunk_attention(self, *args: Any, **options: Any) -> Tensor:
        return chunk_attention(*args, **options)

    def eigenvectors(self, matrices: Tensor) -> Tensor:
        return eigenvectors(matrices)

    def seal_kernel(self, layout: PageLayout) -> SealKernel | None:
        return None

    def check_layout(self, layout: PageLayout) -> None:
        pass

    def exact_plan(self, num_tokens: Tensor, num_pages: int, heads: int) -> dict[str, Any]:
        return {}

    def page_plan(self, layout: PageLayout, num_blocks: Tensor, total: int) -> dict[str, Any]:
        return {}

    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        return "torch"

    def prefill_backend(self, dtype: torch.dtype, dim: int, **scores: Any) -> str:
        return "torch"
