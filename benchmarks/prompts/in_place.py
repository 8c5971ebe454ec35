"""Exact pages as attention may read them: copied into rows first, or where they lie.

An exact page is 64 tokens of K and of V, heads apart, at any unit of 128 bytes. To a kernel for
paged keys that is a tensor of pages whose first axis advances by a unit: neighbours overlap, and a
table of units is a table of pages. FlashAttention 3 as vLLM builds it takes any strides.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.backend import ChunkKind, capability
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.exact.reference import ExactPlaces
from spectral_paged.kernels.ops import page_ops
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS, UNIT_BYTES, exact_page_bytes

SPARE = 3  # pages of a plane that no sequence has


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """The K and V of one sequence in exact pages at scattered units of a plane, uint8."""

    plane: Tensor
    places: ExactPlaces
    num_heads: int
    dim: int
    dtype: torch.dtype
    num_tokens: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> StoredSequence:
        """Store k and v `[Hkv, L, D]`, as the engine does."""
        num_heads, num_tokens, dim = k.shape
        size = exact_page_bytes(num_heads, dim, k.element_size()) // UNIT_BYTES
        count = -(-num_tokens // EXACT_PAGE_TOKENS)
        generator = torch.Generator().manual_seed(num_tokens)
        order = torch.randperm(count + SPARE, generator=generator)[:count]
        units = (order * size).int().to(k.device)
        plane = torch.zeros((count + SPARE) * size * UNIT_BYTES, dtype=torch.uint8, device=k.device)
        place = torch.arange(num_tokens, device=k.device)
        page_ops(k.device).exact_append(
            k.transpose(0, 1).contiguous(),
            v.transpose(0, 1).contiguous(),
            plane,
            units[place // EXACT_PAGE_TOKENS],
            (place % EXACT_PAGE_TOKENS).int(),
        )
        rows = EXACT_PAGE_TOKENS * torch.arange(count, device=k.device).int()
        counts = (num_tokens - rows).clamp(max=EXACT_PAGE_TOKENS)
        places = ExactPlaces(units, rows, counts)
        return cls(plane, places, num_heads, dim, k.dtype, num_tokens)

    def copied(self) -> Tensor:
        """K and V `[2, Hkv, L, D]`, copied out of the pages as the engine does."""
        shape = 2, self.num_heads, self.num_tokens, self.dim
        out = torch.empty(shape, dtype=self.dtype, device=self.plane.device)
        page_ops(self.plane.device).exact_copy(self.plane, self.places, out)
        return out

    def views(self) -> tuple[Tensor, Tensor]:
        """K and V of the page at every unit, `[units, 64, Hkv, D]`, without a copy."""
        values = self.plane.view(self.dtype)
        unit = UNIT_BYTES // values.element_size()
        side = EXACT_PAGE_TOKENS * self.dim
        count = (values.numel() - 2 * self.num_heads * side) // unit + 1
        shape = count, EXACT_PAGE_TOKENS, self.num_heads, self.dim
        strides = unit, self.dim, 2 * side, 1
        start = values.storage_offset()
        k, v = (values.as_strided(shape, strides, start + i * side) for i in (0, 1))
        return k, v


def obstacle(kind: ChunkKind) -> str | None:
    """Why vLLM's FlashAttention 3 is not timed here; None if it is."""
    if capability(kind.device) != (9, 0):
        return "needs a GPU of compute capability 9.0 (H100, H200)"
    return None if importlib.util.find_spec("vllm") else "needs vLLM"


def of_pages(q: Tensor, stored: StoredSequence, spans: ChunkSpans, scale: float) -> Tensor:
    """Causal attention of the sequence's last tokens `[T, Hq, D]`, reading pages where they lie.

    Nothing is uploaded, because the time of that would count.
    """
    table = stored.places.units.unsqueeze(0)
    return _attend(q, *stored.views(), spans, scale, seqused_k=spans.cu_k[1:], block_table=table)


def of_rows(q: Tensor, k: Tensor, v: Tensor, spans: ChunkSpans, scale: float) -> Tensor:
    """The same attention to k and v `[Hkv, L, D]`."""
    return _attend(q, k.transpose(0, 1), v.transpose(0, 1), spans, scale, cu_seqlens_k=spans.cu_k)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spans: ChunkSpans, scale: float, **keys: Tensor
) -> Tensor:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        max_seqlen_q=spans.max_q,
        cu_seqlens_q=spans.cu_q,
        max_seqlen_k=spans.max_k,
        softmax_scale=scale,
        causal=True,
        num_splits=1,
        fa_version=3,
        **keys,
    )
    return out
