"""Paged attention appends a step's K and V to one layer and attends over everything stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.cache.index import ChunkBatch, DecodeBatch, GroupStep
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.errors import FormatError, MissingPackageError
from spectral_paged.kernels.decode.batch import Basis
from spectral_paged.kernels.exact.reference import ExactPlaces
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.ops import PageOps


class PagedAttention:
    """Paged attention over landmarks, pages and tails of a batch of sequences.

    ```
    one new token   decode_attention (landmarks, tail and pages, merged)
    several         spectral_rebuild (pages), exact_copy (landmarks, tail)  ->  chunk_attention
    ```

    Args:
        groups: the cache's layer groups; each layer is in one of them.
        basis: the cache's calibration and format.
        ops: the page ops of the cache's device.
        num_q_heads: number of query heads of a layer.
        scores: scale, cap and sinks; with sinks, every call brings those of its layer.

    Raises:
        MissingPackageError: a library of chunk kernels is installed and does not load.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        basis: CacheBasis,
        ops: PageOps,
        num_q_heads: int,
        scores: Scores,
    ) -> None:
        self._places = {
            layer: (place, group) for place, group in enumerate(groups) for layer in group.layers
        }
        self.basis = basis
        self.ops = ops
        self.num_q_heads = num_q_heads
        self.scores = scores
        arena = groups[0].arena
        self.dtype = arena.dtype
        try:  # a library whose kernels do not load is refused before anything is stored
            for window in {group.window for group in groups}:
                ops.prefill_backend(
                    self.dtype, arena.format.head_dim, self.scores, window, arena.planes.device
                )
        except ImportError as error:
            raise MissingPackageError(str(error)) from error

    def _check(self, step: GroupStep, k: Tensor, v: Tensor, q: Tensor | None = None) -> None:
        format, num_tokens = self.basis.format, len(step.append_units)
        expected = (num_tokens, format.num_kv_heads, format.head_dim)
        queries = (num_tokens, self.num_q_heads, format.head_dim)
        if k.shape != expected or v.shape != expected or (q is not None and q.shape != queries):
            raise FormatError(
                f"a step of {num_tokens} tokens takes q {list(queries)}, k and v {list(expected)}; "
                f"got q {None if q is None else list(q.shape)}, k {list(k.shape)}, v "
                f"{list(v.shape)} (KV heads unexpanded)"
            )

    def _check_sinks(self, sinks: Tensor | None) -> None:
        if sinks is None:
            if self.scores.has_sinks:
                raise FormatError("the cache has attention_sinks: pass each layer's sinks")
        elif not self.scores.has_sinks:
            raise FormatError(
                "the cache has no attention_sinks: make it with attention_sinks=True, or pass none"
            )
        elif sinks.shape != (self.num_q_heads,):
            raise FormatError(
                f"a step takes sinks of shape [{self.num_q_heads}], one a query head; got "
                f"{list(sinks.shape)}"
            )

    def warm_up(self, group: LayerGroup) -> None:
        """Compile the kernels that copy and rebuild history, so that no long prompt waits for it.

        Nothing is written. Pages of an online calibration that still waits are not rebuilt, because
        they have no basis yet.
        """
        plane = group.plane(group.layers[0])
        nothing = torch.zeros(1, dtype=torch.int32, device=plane.device)
        self.ops.exact_copy(plane, ExactPlaces(*3 * (nothing,)), self._rows(plane, 1))
        if group.layout is not None and not self.basis.is_waiting:
            layer = group.layers[0]
            self.ops.compile_rebuild(
                group.plane(layer),
                group.page_table.device[0, :1],
                layout=group.layout,
                rotation=group.rotation,
                basis=self.basis.rows(layer),
                dtype=self.dtype,
            )

    def append(self, steps: Sequence[GroupStep], layer: int, k: Tensor, v: Tensor) -> None:
        """Store k, v `[T, Hkv, D]` in the plane of model layer `layer`.

        Args:
            steps: the step's index tensors, one item a group.

        Raises:
            FormatError: the shapes differ from the step's tokens and the cache's heads.
        """
        place, group = self._places[layer]
        self._check(steps[place], k, v)
        self._append(group, steps[place], layer, k, v)

    def _append(
        self, group: LayerGroup, step: GroupStep, layer: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store k and v; returns them in the dtype and order in which they are stored."""
        k, v = group.in_halves(k.to(self.dtype)), v.to(self.dtype)
        self.ops.exact_append(k, v, group.plane(layer), step.append_units, step.append_offsets)
        return k, v

    def run(
        self,
        steps: Sequence[GroupStep],
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Store k, v `[T, Hkv, D]` of model layer `layer`, then attend with q `[T, Hq, D]`.

        Returns `[T, Hq, D]` in q's dtype. Raises what `append` raises, for q as well, and for sinks
        that are missing or that the cache was not made for.
        """
        place, group = self._places[layer]
        step = steps[place]
        self._check(step, k, v, q)
        if sinks is not None or self.scores.has_sinks:
            self._check_sinks(sinks)
        plane = group.plane(layer)
        shared = self.basis.rows(layer)
        k, v = self._append(group, step, layer, k, v)
        q = group.in_halves(q)
        if step.decode is not None and step.decode_tokens is None:
            return self._decode(step.decode, plane, q, shared, sinks)
        if len(step.chunks) == 1 and step.chunks[0].tokens is None:
            return self._attend(group, step.chunks[0], plane, shared, q, k, v, sinks)
        out = torch.empty_like(q)
        if step.decode is not None:
            places = step.decode_tokens
            out[places] = self._decode(step.decode, plane, q[places], shared, sinks)
        for batch in step.chunks:
            out[batch.tokens] = self._attend(group, batch, plane, shared, q, k, v, sinks)
        return out

    def _attend(
        self,
        group: LayerGroup,
        batch: ChunkBatch,
        plane: Tensor,
        shared: Basis,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attend to a batch of the step's chunks, whose k and v are stored; in q's dtype."""
        if batch.is_fresh:
            keys, values = (_key_rows(batch, x).transpose(0, 1) for x in (k, v))
        else:
            keys, values = self.history(group, batch, plane, shared)
        found = self.ops.chunk_attention(
            _of(batch, q).to(self.dtype),
            keys,
            values,
            spans=batch.spans,
            scores=self.scores,
            window=group.window,
            sinks=sinks,
        )
        return found.to(q.dtype)

    def _decode(
        self, batch: DecodeBatch, plane: Tensor, q: Tensor, shared: Basis, sinks: Tensor | None
    ) -> Tensor:
        exact, pages = batch.exact, batch.pages
        return self.ops.decode_attention(q, plane, exact, pages, self.scores, shared, sinks)

    def history(
        self, group: LayerGroup, batch: ChunkBatch, plane: Tensor, shared: Basis
    ) -> tuple[Tensor, Tensor]:
        """K and V `[Hkv, L, D]` of a batch's chunks in the rows of its spans, pages rebuilt."""
        stored = batch.stored
        assert stored is not None, "the batch is located"
        both = self._rows(plane, batch.spans.num_key_rows)
        if stored.gaps is not None:  # nothing is asked of keys there
            both[1].index_fill_(1, stored.gaps, 0.0)
        self.ops.exact_copy(plane, stored.exact, both)
        if stored.page_units is not None:
            assert group.layout is not None, "only groups with pages have sealed runs"
            self.ops.spectral_rebuild(
                plane,
                stored.page_units,
                layout=group.layout,
                rotation=group.rotation,
                basis=shared,
                dtype=self.dtype,
                places=stored.pages,
                out=(both[0], both[1]),
            )
        return both[0], both[1]

    def _rows(self, plane: Tensor, count: int) -> Tensor:
        """Rows of K and V to write to, `[2 (K|V), Hkv, count, D]`."""
        format = self.basis.format
        shape = 2, format.num_kv_heads, count, format.head_dim
        return plane.new_empty(shape, dtype=self.dtype)


def _of(batch: ChunkBatch, x: Tensor) -> Tensor:
    """The tokens of `batch` in `x` `[T, H, D]` of a step."""
    return x if batch.tokens is None else x[batch.tokens]


def _key_rows(batch: ChunkBatch, x: Tensor) -> Tensor:
    """A step's k or v in the rows of a batch's spans, zeros in gaps, for chunks without history."""
    x = _of(batch, x)
    if batch.key_rows is None:
        return x
    rows = x.new_zeros((batch.spans.num_key_rows, *x.shape[1:]))
    return rows.index_copy_(0, batch.key_rows, x)
