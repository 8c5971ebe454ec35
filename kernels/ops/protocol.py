"""The ops that every device has for pages; the torch twins define their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.decode.batch import Basis, ExactTokens, Pages
from spectral_paged.kernels.exact.reference import ExactPlaces
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.page.layout import PageLayout
from spectral_paged.kernels.rebuild.reference import PagePlaces


class SealKernel(Protocol):
    """A kernel that encodes blocks of exact pages into spectral pages; see `seal.triton.seal`."""

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


class RebuildKernel(Protocol):
    """A kernel that rebuilds K and V of pages; see `rebuild.reference.spectral_rebuild`."""

    def __call__(
        self,
        plane: Tensor,
        units: Tensor,
        *,
        layout: PageLayout,
        first_position: int,
        cos: Tensor,
        sin: Tensor,
        dtype: torch.dtype,
        k_basis: Tensor | None = None,
        v_basis: Tensor | None = None,
        num_pages: int | None = None,
        places: PagePlaces | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class ChunkKernel(Protocol):
    """A kernel that attends prompt chunks; see `chunk.reference.chunk_attention`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        spans: ChunkSpans,
        scale: float,
        softcap: float | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


class PageOps(ABC):
    """The ops over pages, with the same signatures on every device.

    A device's class binds its functions to the names of the ops.
    """

    rebuild_kernel: ClassVar[RebuildKernel]
    chunk_kernel: ClassVar[ChunkKernel]

    @abstractmethod
    def exact_append(
        self, k: Tensor, v: Tensor, plane: Tensor, units: Tensor, offsets: Tensor
    ) -> None:
        """Store new keys and values in exact pages: `exact.reference.exact_append`."""

    @abstractmethod
    def exact_copy(self, plane: Tensor, places: ExactPlaces, out: Tensor) -> None:
        """Copy tokens of exact pages to rows of K and V: `exact.reference.exact_copy`."""

    @abstractmethod
    def decode_attention(
        self,
        q: Tensor,
        plane: Tensor,
        exact: ExactTokens,
        pages: Pages | None,
        scores: Scores,
        basis: Basis,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one query a sequence to its tokens: `decode.reference.decode_attention`."""
        ...

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
        places: PagePlaces | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """K and V of pages, rebuilt: `rebuild.reference.spectral_rebuild`."""
        return self.rebuild_kernel(
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
            places=places,
            out=out,
        )

    @abstractmethod
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
        """Compile the kernels of `spectral_rebuild` for these arguments, without running them."""

    def chunk_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        spans: ChunkSpans,
        scores: Scores,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of prompt chunks: `chunk.reference.chunk_attention`."""
        return self.chunk_kernel(
            q,
            k,
            v,
            spans=spans,
            scale=scores.scale,
            softcap=scores.softcap,
            window=window,
            sinks=sinks,
        )

    @abstractmethod
    def eigenvectors(self, matrices: Tensor) -> Tensor:
        """Eigenvectors of small symmetric matrices: `seal.eigenvectors.eigenvectors`."""
        ...

    @abstractmethod
    def seal_kernel(self, layout: PageLayout) -> SealKernel | None:
        """The kernel that encodes pages of `layout`; None where torch encodes them."""
        ...

    @abstractmethod
    def check_layout(self, layout: PageLayout) -> None:
        """Refuse a layout that these ops do not read.

        Raises:
            ValueError: the message names the limit and what to use instead.
        """

    @abstractmethod
    def plan_exact(self, exact: ExactTokens, max_pages: int) -> ExactTokens:
        """`exact` with the DecodePlan that all layers share, where the device needs one.

        `max_pages` bounds the number of exact pages of all sequences together.
        """
        ...

    @abstractmethod
    def plan_pages(self, pages: Pages, max_entries: int, max_shared: int = 0) -> Pages:
        """`pages` with the DecodePlans that all layers share, where the device needs them.

        Args:
            max_entries: a bound on the number of table entries that all sequences read themselves.
            max_shared: a bound on those that all tiles of `pages.shared` read together.
        """
        ...

    @abstractmethod
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
        """The bytes that a decode step over pages takes between its kernels, of one layer.

        Args:
            max_entries: a bound on the page table entries that `num_seqs` sequences read together.
            max_shared: a bound on those that tiles of them read together beside.
        """
        ...

    @abstractmethod
    def backend(
        self, layout: PageLayout | None, group: int, device: torch.device, rotary_dim: int
    ) -> str:
        """The name in `stats()` of the decode backend: `torch`, `triton`, `gluon` where explicit
        layouts fit, or `gluon and triton`."""
        ...

    @abstractmethod
    def prefill_backend(
        self,
        dtype: torch.dtype,
        dim: int,
        scores: Scores,
        window: int | None,
        device: torch.device,
    ) -> str:
        """The name of the prefill backend: `torch`, or the one of `chunk.gpu` that attends.

        Raises:
            ImportError: a library is installed whose kernels do not load.
        """
        ...
