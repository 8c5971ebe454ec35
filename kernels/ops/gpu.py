"""The ops on a GPU: Triton kernels, and Gluon kernels where a layout and the GPU allow them."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.chunk import gpu as chunk
from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.decode.batch import Basis
from spectral_paged.kernels.decode.gpu import (
    decode_attention,
    implementation,
    planned_exact,
    planned_pages,
)
from spectral_paged.kernels.decode.parts import page_scratch_bytes
from spectral_paged.kernels.decode.shared_pages import seats_per_tile
from spectral_paged.kernels.exact.triton import exact_append, exact_copy
from spectral_paged.kernels.launch.configs import decode_config
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.ops.protocol import PageOps, SealKernel
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.page.triton import check_layout
from spectral_paged.kernels.rebuild.triton import spectral_rebuild
from spectral_paged.kernels.seal.triton import seal
from spectral_paged.kernels.seal.triton.eigenvectors import eigenvectors


class GpuOps(PageOps):
    """The ops over pages, each by its GPU kernels."""

    exact_append = staticmethod(exact_append)
    exact_copy = staticmethod(exact_copy)
    decode_attention = staticmethod(decode_attention)
    rebuild_kernel = staticmethod(spectral_rebuild)
    chunk_kernel = staticmethod(chunk.chunk_attention)
    eigenvectors = staticmethod(eigenvectors)
    check_layout = staticmethod(check_layout)
    plan_exact = staticmethod(planned_exact)
    plan_pages = staticmethod(planned_pages)

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
        spectral_rebuild(
            plane,
            units,
            layout=layout,
            first_position=rotation.first_position,
            cos=rotation.cos,
            sin=rotation.sin,
            dtype=dtype,
            k_basis=basis.k,
            v_basis=basis.v,
            num_pages=1,
            compile_only=True,
        )

    def seal_kernel(self, layout: PageLayout) -> SealKernel | None:
        return seal.seal if seal.supports(layout) else None

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
        heads = layout.num_kv_heads
        target = max(1, decode_config(layout, device).programs // heads)
        seats = seats_per_tile(num_q_heads // heads)

        def scratch(num_seqs: int, num_q_heads: int, entries: int) -> int:
            return page_scratch_bytes(
                layout,
                num_q_heads,
                num_seqs=num_seqs,
                max_entries=entries,
                num_items=min(entries, target + num_seqs),
            )

        own = scratch(num_seqs, num_q_heads, max_entries)
        if not max_shared or seats < 2:
            return own
        return own + scratch(num_seqs // 2, num_q_heads * seats, max_shared)

    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        return "triton" if layout is None else implementation(layout, group, device, rotary_dim)

    def prefill_backend(
        self,
        dtype: torch.dtype,
        dim: int,
        scores: Scores,
        window: int | None,
        device: torch.device,
    ) -> str:
        return chunk.backend(
            ChunkKind(dtype, dim, device, scores.softcap, window, scores.has_sinks)
        )
