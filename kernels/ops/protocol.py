"""What every device can do with pages; the torch twins say what each op means."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from spectral_paged.kernels.page.layout import PageLayout


class SealKernel(Protocol):
    """Encodes blocks where they lie; see `seal.triton.seal`."""

    def __call__(
        self,
        planes: Tensor,
        exact: Tensor,
        pages: Tensor,
        first: Tensor,
        *,
        layout: PageLayout,
        dtype: torch.dtype,
        cos: Tensor,
        sin: Tensor,
        k_projection: Tensor,
        v_projection: Tensor,
        compile_only: bool = False,
    ) -> Tensor: ...


class PageOps(Protocol):
    """Ops with one signature on every device."""

    def exact_append(
        self, k: Tensor, v: Tensor, plane: Tensor, positions: Tensor, offsets: Tensor
    ) -> None:
        """Store new keys and values in exact pages; `exact.reference.exact_append`."""

    def decode_attention(self, *args: Any, **options: Any) -> Tensor:
        """One query a sequence over all it has; `decode.reference.decode_attention`."""
        ...

    def spectral_rebuild(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """K and V of pages; `rebuild.reference.spectral_rebuild`."""
        ...

    def compile_rebuild(self, *args: Any, **options: Any) -> None:
        """Compile what `spectral_rebuild` with these arguments runs; nothing is read or written."""

    def chunk_attention(self, *args: Any, **options: Any) -> Tensor:
        """Causal attention of prompt chunks; `chunk.reference.chunk_attention`."""
        ...

    def eigenvectors(self, matrices: Tensor) -> Tensor:
        """Of many small symmetric matrices; `seal.eigenvectors.eigenvectors`."""
        ...

    def seal_kernel(self, layout: PageLayout) -> SealKernel | None:
        """The kernel that makes pages of `layout`; None where torch encodes them."""
        ...

    def check_layout(self, layout: PageLayout) -> None:
        """Refuse a layout that no op here reads.

        Raises:
            ValueError: the message names the limit and what to use instead.
        """

    def exact_plan(self, num_tokens: Tensor, num_pages: int, heads: int) -> dict[str, Any]:
        """What `decode_attention` of all layers shares over exact pages: `num_tokens` int `[N]` in
        `num_pages` of them together."""
        ...

    def page_plan(self, layout: PageLayout, num_blocks: Tensor, total: int) -> dict[str, Any]:
        """What it shares over pages: `num_blocks` int `[N]` table entries, `total` together."""
        ...

    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        """What decodes, as `stats()` says it: `torch`, `triton`, or `gluon` where explicit layouts
        fit."""
        ...

    def prefill_backend(self, dtype: torch.dtype, dim: int, **scores: Any) -> str:
        """What attends to prompt chunks: `torch`, or a kernel that takes `softcap` and `window`."""
        ...
