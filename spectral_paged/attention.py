"""Append and attend for one layer of a step: which op reads which tier, and how they merge."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_paged.kernels.chunk_attention import chunk_attention
from spectral_paged.kernels.exact_pages import exact_gather
from spectral_paged.kernels.page_ops import PageOps
from spectral_paged.layer_group import LayerGroup
from spectral_paged.online_basis import CacheBasis
from spectral_paged.page_format import PageFormat
from spectral_paged.step import Chunk, GroupStep


class PagedAttention:
    """Attention over landmarks, pages and tail of a batch of sequences.

    ```
    one new token   exact_decode (landmarks, tail)  +  spectral_decode (pages)  ->  merge
    several         spectral_rebuild (pages), exact_gather (landmarks, tail)  ->  chunk_attention
    ```

    Args:
        cos, sin: fp32 `[max_positions, rotary_dim / 2]`, the model's own table.
        basis: the cache's calibration and format.
        ops: what runs on the cache's device.
        scale: softmax scale.
        dtype: element type of exact pages.

    Attributes:
        pages_attended: page reads so far, layer by layer.
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
        self.pages_attended = 0

    @property
    def format(self) -> PageFormat:
        """The page format; an online calibration changes its fingerprint."""
        return self.basis.format

    def run(
        self, group: LayerGroup, step: GroupStep, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Store k, v `[T, Hkv, D]` in the plane of model layer `layer`; q `[T, Hq, D]` attends.

        Returns `[T, Hq, D]` in q's dtype.
        """
        plane = group.plane(layer)
        shared = self.basis.rows(layer)
        self.ops.exact_append(
            k.to(self.dtype), v.to(self.dtype), plane, step.append_positions, step.append_offsets
        )
        out = q.new_empty(q.shape, dtype=torch.float32)
        if len(step.decode_tokens):
            out[step.decode_tokens] = self._decode(
                group, step, plane, q[step.decode_tokens], shared
            )
        for chunk in step.chunks:
            span = slice(chunk.flat_start, chunk.flat_start + chunk.num_new)
            out[span] = self._chunk(group, chunk, plane, q[span], shared)
        return out.to(q.dtype)

    def _decode(
        self,
        group: LayerGroup,
        step: GroupStep,
        plane: Tensor,
        q: Tensor,
        shared: dict[str, Tensor],
    ) -> Tensor:
        out, lse = self.ops.exact_decode(
            q,
            plane,
            group.exact_table.device[step.decode_rows],
            step.decode_exact,
            num_kv_heads=self.format.num_kv_heads,
            scale=self.scale,
            dtype=self.dtype,
            **step.exact_plan,
        )
        if not step.num_decode_pages:
            return out
        self.pages_attended += step.num_decode_pages
        page_out, page_lse = self.ops.spectral_decode(
            q,
            plane,
            group.page_table.device[step.decode_rows],
            step.decode_blocks,
            layout=self.format.layout,
            first_position=self.format.num_landmark_tokens,
            cos=self.cos,
            sin=self.sin,
            scale=self.scale,
            **shared,
            **step.page_plan,
        )
        return self.ops.merge([out, page_out], [lse, page_lse])[0]

    def _chunk(
        self,
        group: LayerGroup,
        chunk: Chunk,
        plane: Tensor,
        q: Tensor,
        shared: dict[str, Tensor],
    ) -> Tensor:
        k, v = exact_gather(
            plane,
            group.exact_table.device[chunk.row],
            chunk.num_exact,
            self.format.num_kv_heads,
            self.format.head_dim,
            self.dtype,
        )
        if chunk.num_pages:
            self.pages_attended += chunk.num_pages
            history = self.ops.spectral_rebuild(
                plane,
                group.page_table.device[chunk.row, : chunk.num_blocks],
                layout=self.format.layout,
                first_position=self.format.num_landmark_tokens,
                cos=self.cos,
                sin=self.sin,
                dtype=self.dtype,
                num_pages=chunk.num_pages,
                **shared,
            )
            k = torch.cat((history[0], k), dim=1)
            v = torch.cat((history[1], v), dim=1)
        return chunk_attention(q, k, v, scale=self.scale)
