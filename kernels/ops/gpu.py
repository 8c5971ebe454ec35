"""The ops by kernels: Triton, and Gluon where a layout and the GPU allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.chunk import gpu as chunk
from spectral_paged.kernels.decode.gpu import decode_attention, implementation, plan_pages
from spectral_paged.kernels.decode.triton.exact import plan_exact
from spectral_paged.kernels.exact.triton import exact_append
from spectral_paged.kernels.launch.configs import decode_config
from spectral_paged.kernels.ops.protocol import SealKernel
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import check_layout
from spectral_paged.kernels.rebuild.triton import spectral_rebuild
from spectral_paged.kernels.seal.triton import seal
from spectral_paged.kernels.seal.triton.eigenvectors import eigenvectors


class GpuOps:
    """Every op by its kernels."""

    def exact_append(
        self, k: Tensor, v: Tensor, plane: Tensor, positions: Tensor, offsets: Tensor
    ) -> None:
        exact_append(k, v, plane, positions, offsets)

    def decode_attention(self, *args: Any, **options: Any) -> Tensor:
        return decode_attention(*args, **options)

    def spectral_rebuild(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return spectral_rebuild(*args, **options)

    def compile_rebuild(self, *args: Any, **options: Any) -> None:
        spectral_rebuild(*args, **options, compile_only=True)

    def chunk_attention(self, *args: Any, **options: Any) -> Tensor:
        return chunk.chunk_attention(*args, **options)

    def eigenvectors(self, matrices: Tensor) -> Tensor:
        return eigenvectors(matrices)

    def seal_kernel(self, layout: PageLayout) -> SealKernel | None:
        return seal.seal if seal.supports(layout) else None

    def check_layout(self, layout: PageLayout) -> None:
        check_layout(layout)

    def exact_plan(self, num_tokens: Tensor, num_pages: int, heads: int) -> dict[str, Any]:
        return {"exact_plan": plan_exact(num_tokens, num_pages, heads)}

    def page_plan(self, layout: PageLayout, num_blocks: Tensor, total: int) -> dict[str, Any]:
        config = decode_config(layout, num_blocks.device)
        return {"page_plan": plan_pages(layout, num_blocks, total, config), "config": config}

    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        return "triton" if layout is None else implementation(layout, group, device, rotary_dim)

    def prefill_backend(self, dtype: torch.dtype, dim: int, **scores: Any) -> str:
        return chunk.backend(dtype, dim, **scores)
