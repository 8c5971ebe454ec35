"""Replayed steps are decode steps whose index lies in static tensors, as CUDA graphs read it.

```
index        begin_step found where the step's tokens go     host, one StepIndex a group
             its DecodeRows are copied                       by the caller, into what was captured
steps        kernels' tables of those rows                   device, inside the captured pass
reading      attend takes them from there                    each layer, or all layers at once
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from spectral_paged.cache.cache import SpectralKVCache
from spectral_paged.cache.decode_rows import DecodeRows
from spectral_paged.cache.index import DecodeBatch, GroupStep, StepIndex
from spectral_paged.cache.layer_group import LayerGroup


class ReplayedSteps:
    """The decode steps of one cache whose index lies in static tensors (decision 0019)."""

    def __init__(self, cache: SpectralKVCache) -> None:
        self._cache = cache

    @property
    def num_groups(self) -> int:
        """The number of layer groups, each with an index of its own."""
        return len(self._cache.groups)

    @property
    def has_tiles(self) -> bool:
        """True if a group has sequences read together the pages that they share."""
        return any(group.tiles is not None for group in self._cache.groups)

    @property
    def index(self) -> Sequence[StepIndex]:
        """The index of the open step, one item a group."""
        assert self._cache.open_step is not None, "between begin_step and end_step"
        return self._cache.open_step.index

    def steps(
        self,
        rows: Sequence[Tensor],
        max_blocks: int,
        tiles: Sequence[Tensor] | None = None,
        max_shared: int = 0,
    ) -> list[GroupStep]:
        """Make the index tensors of each group from `rows`; made in a captured pass, a replay makes
        them again.

        Args:
            rows: `DecodeRows` of each group, int32 `[7, N]`; kernels read their values when they
                run.
            max_blocks: bound on the page table entries that sequences of a group read themselves.
            tiles: `TiledReads.columns` of each group, int32 `[2, N]`; None: the steps have none.
            max_shared: bound on the page table entries that tiles of a group read.
        """
        columns: Sequence[Tensor | None] = [None] * len(rows) if tiles is None else tiles
        return [
            self._step(group, part, max_blocks, seats, max_shared)
            for group, part, seats in zip(self._cache.groups, rows, columns, strict=True)
        ]

    @contextmanager
    def reading(self, steps: Sequence[GroupStep]) -> Iterator[None]:
        """Let `attend` read the index from `steps` inside the `with`, not from the open step."""
        self._cache.replayed = steps
        try:
            yield
        finally:
            self._cache.replayed = None

    def _step(
        self,
        group: LayerGroup,
        rows: Tensor,
        max_blocks: int,
        tiles: Tensor | None,
        max_shared: int,
    ) -> GroupStep:
        columns = DecodeRows(*rows)
        decode = DecodeBatch.of(
            group,
            columns,
            max_exact_pages=rows.shape[1] * group.exact_table.width,
            max_blocks=max_blocks if group.seals else 0,
            ops=self._cache.ops,
            tiles=None if tiles is None else tiles.unbind(),
            max_shared=max_shared if group.tiles is not None else 0,
        )
        return GroupStep(columns.append_unit, columns.append_offset, decode, None, ())
