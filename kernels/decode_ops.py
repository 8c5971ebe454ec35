"""The ops of a decode step for a device: torch twins on the CPU, Triton on CUDA. Nothing else
decides, and nothing falls back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels import exact_decode, merge, spectral_decode
from spectral_paged.kernels.layout import PageLayout


@dataclass(frozen=True, slots=True)
class DecodeOps:
    """Ops with one signature; see the twins.

    Attributes:
        plans: arguments that the ops of one step share, made once for all layers.
    """

    exact_decode: Callable[..., tuple[Tensor, Tensor]]
    spectral_decode: Callable[..., tuple[Tensor, Tensor]]
    merge: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]
    on_gpu: bool = False

    def backend(self, layout: PageLayout | None, group: int, device: torch.device) -> str:
        """What `stats()` says: `torch`, `triton`, or `gluon` where explicit layouts fit."""
        if not self.on_gpu:
            return "torch"
        from spectral_paged.kernels.spectral_decode_gpu import implementation

        return "triton" if layout is None else implementation(layout, group, device)

    def exact_plan(self, num_tokens: Tensor, num_pages: int, heads: int) -> dict[str, Any]:
        """For `exact_decode`: `num_tokens` int `[N]` in `num_pages` exact pages together."""
        if not self.on_gpu:
            return {}
        from spectral_paged.kernels.exact_decode_triton import plan_exact

        return {"plan": plan_exact(num_tokens, num_pages, heads)}

    def page_plan(self, layout: PageLayout, num_blocks: Tensor, total: int) -> dict[str, Any]:
        """For `spectral_decode`: `num_blocks` int `[N]` table entries, `total` together."""
        if not self.on_gpu:
            return {}
        from spectral_paged.kernels.spectral_decode_gpu import plan_pages

        return {"plan": plan_pages(layout, num_blocks, total)}


TORCH_OPS = DecodeOps(exact_decode.exact_decode, spectral_decode.spectral_decode, merge.merge)


def decode_ops(device: torch.device) -> DecodeOps:
    """The ops that run on `device`."""
    if device.type != "cuda":
        return TORCH_OPS
    from spectral_paged.kernels import exact_decode_triton, merge_triton, spectral_decode_gpu

    return DecodeOps(
        exact_decode_triton.exact_decode,
        spectral_decode_gpu.spectral_decode,
        merge_triton.merge,
        on_gpu=True,
    )


def check_layout(layout: PageLayout, device: torch.device) -> None:
    """Refuse a layout that no op on `device` reads.

    Raises:
        ValueError: the message names the limit and what to use instead.
    """
    if device.type == "cuda":
        from spectral_paged.kernels.triton_page import check_layout as check

        check(layout)
