"""Append and attend for one layer of a step: which op reads which tier, and how they merge."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.exact_pages import exact_gather
from spectral_paged.kernels.layout import BLOCK_TOKENS
from spectral_paged.kernels.page_ops import PageOps
from spectral_paged.layer_group import LayerGroup
from spectral_paged.online_basis import CacheBasis
from spectral_paged.page_format import PageFormat
from spectral_paged.step import ChunkBatch, DecodeBatch, GroupStep


class PagedAttention:
    """Attention over landmarks, pages and tail of a batch of sequences.

    ```
    one new token   decode_attention (landmarks, tail and pages, merged)
    several         spectral_rebuild (pages), exact_gather (landmarks, tail)  ->  chunk_attention
    ```

    Args:
        cos, sin: fp32 `[max_positions, rotary_dim / 2]`, the model's own table.
        basis: the cache's calibration and format.
        ops: what runs on the cache's device.
        scale: softmax scale.
        dtype: element type of exact pages.
    """

    def __init__(
        self,
        basis: CacheBasis,
        ops: PageOps,
        *,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        self.basis = basis
        self.ops = ops
        self.cos = cos
        self.sin = sin
        self.scale = scale
        self.dtype = dtype

    @property
    def format(self) -> PageFormat:
        """The page format; an online calibration changes its fingerprint."""
        return self.basis.format

    def append(
        self, group: LayerGroup, step: GroupStep, layer: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store k, v `[T, Hkv, D]` in the plane of model layer `layer`; both as they are stored."""
        k, v = k.to(self.dtype), v.to(self.dtype)
        self.ops.exact_append(
            k, v, group.plane(layer), step.append_positions, step.append_offsets
        )
        return k, v

    def run(
        self, group: LayerGroup, step: GroupStep, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Store k, v `[T, Hkv, D]` in the plane of model layer `layer`; q `[T, Hq, D]` attends.

        Returns `[T, Hq, D]` in q's dtype.
        """
        plane = group.plane(layer)
        shared = self.basis.rows(layer)
        k, v = self.append(group, step, layer, k, v)
        if step.decode is not None and step.decode_tokens is None:
            return self._decode(step.decode, plane, q, shared)
        out = torch.empty_like(q)
        if step.decode is not None:
            places = step.decode_tokens
            out[places] = self._decode(step.decode, plane, q[places], shared)
        for batch in step.chunks:
            tokens = slice(None) if batch.tokens is None else batch.tokens
            if batch.is_fresh:
                keys, values = (x[tokens].transpose(0, 1) for x in (k, v))
            else:
                keys, values = self._history(group, batch, plane, shared)
            found = self.ops.chunk_attention(
                q[tokens].to(self.dtype), keys, values, spans=batch.spans, scale=self.scale
            )
            out[tokens] = found.to(q.dtype)
        return out

    def _decode(
        self, batch: DecodeBatch, plane: Tensor, q: Tensor, shared: dict[str, Tensor]
    ) -> Tensor:
        return self.ops.decode_attention(
            q,
            plane,
            batch.exact_table,
            batch.exact,
            batch.page_table if batch.has_pages else None,
            batch.blocks,
            num_kv_heads=self.format.num_kv_heads,
            scale=self.scale,
            dtype=self.dtype,
            layout=self.format.layout if batch.has_pages else None,
            first_position=self.format.num_landmark_tokens,
            cos=self.cos,
            sin=self.sin,
            **shared,
            **batch.plans,
        )

    def _history(
        self, group: LayerGroup, batch: ChunkBatch, plane: Tensor, shared: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """K and V `[Hkv, L, D]` of chunks behind each other: pages rebuilt, then exact tokens."""
        heads, dim = self.format.num_kv_heads, self.format.head_dim
        keys, values = (
            plane.new_empty((heads, batch.spans.k_ends[-1], dim), dtype=self.dtype)
            for _ in range(2)
        )
        for chunk, (_, span) in zip(batch.chunks, batch.spans, strict=True):
            k, v = keys[:, span], values[:, span]
            rebuilt = chunk.num_pages * BLOCK_TOKENS
            if chunk.num_pages:
                self.ops.spectral_rebuild(
                    plane,
                    group.page_table.device[chunk.row, : chunk.num_blocks],
                    layout=self.format.layout,
                    first_position=self.format.num_landmark_tokens,
                    cos=self.cos,
                    sin=self.sin,
                    dtype=self.dtype,
                    num_pages=chunk.num_pages,
                    out=(k[:, :rebuilt], v[:, :rebuilt]),
                    **shared,
                )
            exact_gather(
                plane,
                group.exact_table.device[chunk.row],
                chunk.num_exact,
                heads,
                dim,
                self.dtype,
                out=(k[:, rebuilt:], v[:, rebuilt:]),
            )
        return keys, values
