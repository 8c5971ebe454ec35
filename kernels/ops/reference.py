"""The ops in torch and fp32: a CPU runs them, and tests compare kernels with them."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.reference import chunk_attention
from spectral_paged.kernels.decode.batch import Basis, ExactTokens, Pages
from spectral_paged.kernels.decode.reference import decode_attention
from spectral_paged.kernels.exact.reference import exact_append, exact_copy
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.ops.protocol import PageOps, SealKernel
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.rebuild.reference import spectral_rebuild
from spectral_paged.kernels.seal.eigenvectors import eigenvectors


class TorchOps(PageOps):
    """The ops over pages, each by its torch twin; none plans or compiles."""

    exact_append = staticmethod(exact_append)
    exact_copy = staticmethod(exact_copy)
    decode_attention = staticmethod(decode_attention)
    rebuild_kernel = staticmethod(spectral_rebuild)
    chunk_kernel = staticmethod(chunk_attention)
    eigenvectors = staticmethod(eigenvectors)

    def compile_rebuild(
        self,
        plane: Tensor,
        units: Tensor,
        *,
        layout: PageLayout,
        rotation: Rotation,
        basis: Basis,
        dtype: torch.dtype,
    ) -> None:
        pass

    def seal_kernel(self, layout: PageLayout) -> SealKernel | None:
        return None

    def check_layout(self, layout: PageLayout) -> None:
        pass

    def plan_exact(self, exact: ExactTokens, max_pages: int) -> ExactTokens:
        return exact

    def plan_pages(self, pages: Pages, max_entries: int, max_shared: int = 0) -> Pages:
        return pages

    def decode_scratch_bytes(
        self,
        layout: PageLayout,
        num_q_heads: int,
        device: torch.device,
        *,
        num_seqs: int,
        max_entries: int,
        max_shared: int = 0,
    ) -> int:
        return 0  # it attends to one sequence after the other

    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        return "torch"

    def prefill_backend(
        self,
        dtype: torch.dtype,
        dim: int,
        scores: Scores,
        window: int | None,
        device: torch.device,
    ) -> str:
        return "torch"
