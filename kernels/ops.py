"""The ops over pages for a device: torch twins on the CPU, Triton on CUDA. Nothing else decides,
and nothing falls back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.chunk import reference as chunk_attention
from spectral_paged.kernels.decode import reference as decode_attention
from spectral_paged.kernels.exact import reference as exact_pages
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.rebuild import reference as spectral_rebuild
from spectral_paged.kernels.seal import eigenvectors


@dataclass(frozen=True, slots=True)
class PageOps:
    """Ops with one signature; see the twins.

    `seal` encodes blocks where they lie (`seal_triton.seal`); None where that is left to
    `codec.encode_pages`, its twin, which takes `eigenvectors` for pages with a basis of their own.
    """

    exact_append: Callable[..., None]
    decode_attention: Callable[..., Tensor]
    spectral_rebuild: Callable[..., tuple[Tensor, Tensor]]
    chunk_attention: Callable[..., Tensor]
    eigenvectors: Callable[[Tensor], Tensor]
    seal: Callable[..., Tensor] | None = None
    on_gpu: bool = False

    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        """What `stats()` says of decoding: `torch`, `triton`, or `gluon` where explicit layouts
        fit."""
        if not self.on_gpu:
            return "torch"
        from spectral_paged.kernels.decode.pages_gpu import implementation

        return "triton" if layout is None else implementation(layout, group, device, rotary_dim)

    def prefill_backend(self, dtype: torch.dtype, dim: int, **scores: Any) -> str:
        """What `stats()` says of attention of prompt chunks: `torch`, or what
        `chunk_attention_gpu` takes with its `softcap` and `window`."""
        if not self.on_gpu:
            return "torch"
        from spectral_paged.kernels.chunk.gpu import backend

        return backend(dtype, dim, **scores)

    def seal_backend(self, layout: PageLayout | None) -> str:
        """What encodes: `triton` (the seal kernel) or `torch` (`codec.encode_pages`)."""
        return "triton" if layout is not None and self.seals(layout) else "torch"

    def seals(self, layout: PageLayout) -> bool:
        """Whether `seal` makes pages of `layout`."""
        if self.seal is None:
            return False
        from spectral_paged.kernels.seal.triton.seal import supports

        return supports(layout)

    def exact_plan(self, num_tokens: Tensor, num_pages: int, heads: int) -> dict[str, Any]:
        """What `decode_attention` of all layers shares over exact pages: `num_tokens` int `[N]` in
        `num_pages` of them together."""
        if not self.on_gpu:
            return {}
        from spectral_paged.kernels.decode.triton.exact import plan_exact

        return {"exact_plan": plan_exact(num_tokens, num_pages, heads)}

    def page_plan(self, layout: PageLayout, num_blocks: Tensor, total: int) -> dict[str, Any]:
        """What it shares over pages: `num_blocks` int `[N]` table entries, `total` together."""
        if not self.on_gpu:
            return {}
        from spectral_paged.kernels.decode.pages_gpu import plan_pages
        from spectral_paged.kernels.launch.configs import decode_config

        config = decode_config(layout, num_blocks.device)
        return {"page_plan": plan_pages(layout, num_blocks, total, config), "config": config}


TORCH_OPS = PageOps(
    exact_pages.exact_append,
    decode_attention.decode_attention,
    spectral_rebuild.spectral_rebuild,
    chunk_attention.chunk_attention,
    eigenvectors.eigenvectors,
)


def page_ops(device: torch.device) -> PageOps:
    """The ops that run on `device`."""
    if device.type != "cuda":
        return TORCH_OPS
    from spectral_paged.kernels.chunk import gpu as chunk_attention_gpu
    from spectral_paged.kernels.decode import gpu as decode_attention_gpu
    from spectral_paged.kernels.exact import triton as exact_append_triton
    from spectral_paged.kernels.rebuild import triton as spectral_rebuild_triton
    from spectral_paged.kernels.seal.triton import (
        eigenvectors as eigenvectors_triton,
        seal as seal_triton,
    )

    return PageOps(
        exact_append_triton.exact_append,
        decode_attention_gpu.decode_attention,
        spectral_rebuild_triton.spectral_rebuild,
        chunk_attention_gpu.chunk_attention,
        eigenvectors_triton.eigenvectors,
        seal=seal_triton.seal,
        on_gpu=True,
    )


def check_layout(layout: PageLayout, device: torch.device) -> None:
    """Refuse a layout that no op on `device` reads.

    Raises:
        ValueError: the message names the limit and what to use instead.
    """
    if device.type == "cuda":
        from spectral_paged.kernels.page.triton import check_layout as check

        check(layout)
