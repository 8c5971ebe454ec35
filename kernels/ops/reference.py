"""The ops in torch and fp32: a CPU runs them, and tests compare kernels with them."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.reference import ChunkSpans, chunk_attention
from spectral_paged.kernels.decode.batch import Basis, ExactTokens, Pages
from spectral_paged.kernels.decode.reference import decode_attention
from spectral_paged.kernels.exact.reference import exact_append
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.ops.protocol import SealKernel
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.rebuild.reference import spectral_rebuild
from spectral_paged.kernels.seal.eigenvectors import eigenvectors


class TorchOps:
    """The ops over pages, each by its torch twin; none plans or compiles."""

    def exact_append(
        self, k: Tensor, v: Tensor, plane: Tensor, units: Tensor, offsets: Tensor
    ) -> None:
        exact_append(k, v, plane, units, offsets)

    def decode_attention(
        self,
        q: Tensor,
        plane: Tensor,
        exact: ExactTokens,
        pages: Pages | None,
        scores: Scores,
        basis: Basis,
    ) -> Tensor:
        return decode_attention(q, plane, exact, pages, scores, basis)

    def spectral_rebuild(
        self,
        plane: Tensor,
        units: Tensor,
        *,
        layout: PageLayout,
        rotation: Rotation,
        basis: Basis,
        dtype: torch.dtype,
        num_pages: int | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return spectral_rebuild(
            plane,
            units,
            layout=layout,
            first_position=rotation.first_position,
            cos=rotation.cos,
            sin=rotation.sin,
            dtype=dtype,
            k_basis=basis.k,
            v_basis=basis.v,
            num_pages=num_pages,
            out=out,
        )

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

    def chunk_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        spans: ChunkSpans,
        scores: Scores,
        window: int | None = None,
    ) -> Tensor:
        return chunk_attention(
            q, k, v, spans=spans, scale=scores.scale, softcap=scores.softcap, window=window
        )

    def eigenvectors(self, matrices: Tensor) -> Tensor:
        return eigenvectors(matrices)

    def seal_kernel(self, layout: PageLayout) -> SealKernel | None:
        return None

    def check_layout(self, layout: PageLayout) -> None:
        pass

    def plan_exact(self, exact: ExactTokens, max_pages: int) -> ExactTokens:
        return exact

    def plan_pages(self, pages: Pages, max_entries: int) -> Pages:
        return pages

    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        return "torch"

    def prefill_backend(
        self, dtype: torch.dtype, dim: int, scores: Scores, window: int | None
    ) -> str:
        return "torch"
