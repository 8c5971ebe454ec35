"""An encoder turns blocks of a layer group into pages, by the seal kernel or by the codec.

```
planes   uint8 [L, plane_bytes]      exact pages are read there, pages are written there
exact    int32 [B, 8]                units of each block's exact pages
pages    int32 [B]                   units of the pages to write, the same in every layer
first    int32 [B]                   position of each block's first token
bad      int32 [B, L, H, 2]          elements of K and of V that are NaN or Inf
```

A block with NaN or Inf is written as well, but its page means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.kernels.exact.reference import read_blocks
from spectral_paged.kernels.math.rotary import Rotation, stored_keys
from spectral_paged.kernels.ops import PageOps, SealKernel
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS, PageLayout
from spectral_paged.kernels.page.view import put_units
from spectral_paged.pages import encode_pages

BLOCKS_AT_ONCE = 8  # bounds torch's fp32 working set; encoding is pure: batching changes no byte


class Encoder(Protocol):
    """An encoder reads blocks from a group's planes and writes their pages there."""

    @property
    def backend(self) -> str:
        """The encoder's name in `stats()`."""
        ...

    def warm_up(self, planes: Tensor) -> None:
        """Compile the kernels that `seal` runs; nothing is written."""

    def seal(self, planes: Tensor, exact: Tensor, pages: Tensor, first: Tensor) -> Tensor:
        """Write the pages of B blocks; returns `bad`."""
        ...


@dataclass(frozen=True, slots=True)
class BlockKind:
    """The properties that all blocks of a group share.

    layers: model layers whose planes hold the blocks.
    layout: layout of the blocks' pages.
    dtype: element type of the exact pages.
    rotation: rotation of the keys.
    """

    layers: list[int]
    layout: PageLayout
    dtype: torch.dtype
    rotation: Rotation

    def read(self, planes: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        """K after RoPE, pairs in halves, and V of blocks: `[B, L, H, 512, D]`."""
        heads, dim = self.layout.num_kv_heads, self.layout.head_dim
        return read_blocks(planes, exact, heads, dim, self.dtype)

    def stored(self, k: Tensor, first: Tensor, rope: str) -> Tensor:
        """Keys `[B, L, H, 512, D]` as pages with `rope` store them; unchanged in layers that rotate
        nothing."""
        if rope == "post" or not self.rotation.cos.numel():
            return k
        rows = first.long().unsqueeze(-1) + torch.arange(BLOCK_TOKENS, device=first.device)
        cos, sin = (x[rows][:, None, None] for x in (self.rotation.cos, self.rotation.sin))
        return stored_keys(k, cos, sin, rope)


def count_non_finite(k: Tensor, v: Tensor) -> Tensor:
    """The numbers of NaN or Inf in K and V `[B, L, H, 512, D]`: int32 `[B, L, H, 2]`."""
    sides = [(~torch.isfinite(x)).sum((-2, -1), dtype=torch.int32) for x in (k, v)]
    return torch.stack(sides, dim=-1)


class KernelEncoder:
    """An encoder by a seal kernel; `basis` must be decided before the first seal."""

    backend = "triton"

    def __init__(self, kernel: SealKernel, kind: BlockKind, basis: CacheBasis) -> None:
        self._kernel, self._kind, self._basis = kernel, kind, basis

    def warm_up(self, planes: Tensor) -> None:
        exact, pages, first = (
            torch.zeros(shape, dtype=torch.int32, device=planes.device)
            for shape in ((1, BLOCK_TOKENS // EXACT_PAGE_TOKENS), (1,), (1,))
        )
        self.seal(planes, exact, pages, first, compile_only=True)

    def seal(
        self,
        planes: Tensor,
        exact: Tensor,
        pages: Tensor,
        first: Tensor,
        *,
        compile_only: bool = False,
    ) -> Tensor:
        kind = self._kind
        projections = self._basis.projections(kind.layers)
        return self._kernel(
            planes,
            exact,
            pages,
            first,
            layout=kind.layout,
            dtype=kind.dtype,
            cos=kind.rotation.cos,
            sin=kind.rotation.sin,
            k_projection=projections["k_projection"],
            v_projection=projections["v_projection"],
            compile_only=compile_only,
        )


class TorchEncoder:
    """An encoder by the codec, for every format; `basis` must be decided before the first seal."""

    backend = "torch"

    def __init__(self, kind: BlockKind, basis: CacheBasis) -> None:
        self._kind, self._basis = kind, basis

    def warm_up(self, planes: Tensor) -> None:
        if planes.is_cuda:  # elsewhere nothing is compiled
            layout = self._kind.layout
            shape = (1, layout.num_kv_heads, BLOCK_TOKENS, layout.head_dim)
            block = torch.zeros(shape, device=planes.device)
            self._encode(block, block, self._kind.layers[:1])

    def seal(self, planes: Tensor, exact: Tensor, pages: Tensor, first: Tensor) -> Tensor:
        spans = [slice(at, at + BLOCKS_AT_ONCE) for at in range(0, len(pages), BLOCKS_AT_ONCE)]
        return torch.cat([self._seal(planes, exact[s], pages[s], first[s]) for s in spans])

    def _seal(self, planes: Tensor, exact: Tensor, pages: Tensor, first: Tensor) -> Tensor:
        k, v = self._kind.read(planes, exact)
        bad = count_non_finite(k, v)
        k, v = (x.nan_to_num(0.0, 0.0, 0.0) for x in (k, v))
        k = self._kind.stored(k, first, self._kind.layout.rope)
        layers = self._kind.layers * len(pages)
        found = self._encode(k.flatten(0, 1), v.flatten(0, 1), layers)
        put_units(planes, pages, found.unflatten(0, (len(pages), -1)).transpose(0, 1))
        return bad

    def _encode(self, k: Tensor, v: Tensor, layers: list[int]) -> Tensor:
        return encode_pages(k, v, self._basis.format, basis=self._basis.bound, layers=layers)


def encoder_of(kind: BlockKind, basis: CacheBasis, ops: PageOps) -> Encoder:
    """The encoder of a group's blocks: a kernel if `ops` has one for their layout, or the codec."""
    kernel = ops.seal_kernel(kind.layout)
    return TorchEncoder(kind, basis) if kernel is None else KernelEncoder(kernel, kind, basis)
