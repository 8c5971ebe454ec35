"""The inputs of captured decode steps lie in one static tensor, which every step fills anew."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from operator import is_
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from spectral_paged.cache import (
    DecodeRows,
    GroupStep,
    ReplayedSteps,
    SpectralKVCache,
    StepIndex,
    TiledReads,
)
from spectral_paged.device import upload
from spectral_paged.sampling import PendingTokens

NOWHERE = -1
STAGING = 4  # host buffers, so that so many copies to the device may be in flight

Rows = TypeVar("Rows", np.ndarray, Tensor)
Column = TypeVar("Column")


class TokenRows(NamedTuple, Generic[Column]):
    """The new token of each sequence of a decode step, int32 `[N]` each, shared by all layers.

    ids: the token ids that the host has.
    sources: the index of the pending token that replaces the id; negative: none.
    positions: the token's place in its sequence.
    """

    ids: Column
    sources: Column
    positions: Column


# Graphs have a fixed batch size. These columns pad a batch with sequences that have no tokens and
# whose new token is stored nowhere.
NO_TOKEN = np.array([TokenRows(ids=0, sources=NOWHERE, positions=0)], np.int32).T
NO_SEQUENCE = np.array([DecodeRows(NOWHERE, *[0] * (len(DecodeRows._fields) - 1))], np.int32).T


class DecodeInputs(NamedTuple, Generic[Rows]):
    """The inputs that a captured decode step reads: parts of one int32 array or tensor.

    ```
    tokens        ids, sources, positions                              [3, N]
    groups[0]     append_unit, append_offset, table_row, exact, ...    [7, N]
    groups[1]     ...
    ```

    tokens: the columns of `TokenRows`.
    groups: the columns of `DecodeRows`, of each layer group.
    """

    tokens: Rows
    groups: list[Rows]

    @staticmethod
    def num_rows(num_groups: int) -> int:
        return len(NO_TOKEN) + len(NO_SEQUENCE) * num_groups

    @classmethod
    def of(cls, rows: Rows) -> DecodeInputs[Rows]:
        """Return the parts of an array or a tensor of `num_rows` rows, as views."""
        begin, step = len(NO_TOKEN), len(NO_SEQUENCE)
        return cls(rows[:begin], [rows[i : i + step] for i in range(begin, len(rows), step)])


def fill_inputs(
    staging: np.ndarray,
    token_ids: Sequence[int],
    positions: Sequence[int] | np.ndarray,
    pending: PendingTokens | None,
    index: Sequence[StepIndex],
) -> None:
    """Write a decode step into `staging`, `DecodeInputs` of at least as many sequences.

    Args:
        index: the step's index of each layer group; empty if the step has no tokens.
    """
    count = len(token_ids)
    sources = NOWHERE if pending is None else pending.sources
    tokens, groups = DecodeInputs.of(staging)
    for row, column in zip(tokens, TokenRows(token_ids, sources, positions), strict=True):
        row[:count] = column
    tokens[:, count:] = NO_TOKEN
    for rows in groups:
        rows[:, count:] = NO_SEQUENCE
    for rows, group in zip(groups, index, strict=count > 0):
        rows[:, :count] = group.decode


class StaticInputs:
    """The tensors that captured decode steps of one cache read, and the host buffers behind them.

    One copy from the host fills them, because the inputs of all graphs are parts of one tensor. The
    tiles of steps that have some lie in a second one, which is filled only when they change.

    Args:
        max_rows: tokens of the largest step; None: one of each sequence.
    """

    def __init__(self, cache: SpectralKVCache, max_rows: int | None = None) -> None:
        self._steps = ReplayedSteps(cache)
        most = max_rows or cache.max_num_seqs
        # rows start at multiples of 128 bytes, because Triton specialises on pointer alignment
        shape = DecodeInputs.num_rows(self._steps.num_groups), -(-most // 32) * 32
        self._device = torch.zeros(shape, dtype=torch.int32, device=cache.device)
        cuda = cache.device.type == "cuda"
        self._staging = [
            torch.zeros(shape, dtype=torch.int32, pin_memory=cuda) for _ in range(STAGING)
        ]
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(STAGING)]
        self._turn = 0
        width = shape[1]
        self._tiles = torch.zeros(
            self._steps.num_groups, 2, width, dtype=torch.int32, device=cache.device
        )
        self._tiled: list[TiledReads | None] = []  # what lies there

    @property
    def has_tiles(self) -> bool:
        """True if sequences of a step may read pages together."""
        return self._steps.has_tiles

    @property
    def own_blocks(self) -> int:
        """The page table entries that the open step's sequences read themselves, at most."""
        return max(group.own_blocks for group in self._steps.index)

    @property
    def tile_blocks(self) -> int:
        """The page table entries that the open step's tiles read, at most; 0 without tiles."""
        return max(group.tile_blocks for group in self._steps.index)

    @property
    def num_blocks(self) -> int:
        """The page table entries that the cache's open step reads, of the group with most."""
        return max(group.num_blocks for group in self._steps.index)

    def fill(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int] | np.ndarray,
        pending: PendingTokens | None = None,
    ) -> None:
        """Queue the copy of the cache's open step, one token a sequence, to the device."""
        self._copy(token_ids, positions, pending, self._steps.index)
        tiles = [group.tiles for group in self._steps.index]
        known = len(tiles) == len(self._tiled) and all(map(is_, tiles, self._tiled))
        if any(found is not None for found in tiles) and not known:
            self._seat(tiles)

    def _seat(self, tiles: list[TiledReads | None]) -> None:
        columns = np.zeros(tuple(self._tiles.shape), np.int32)
        for place, found in enumerate(tiles):
            if found is not None:
                columns[place, :, : found.columns.shape[1]] = found.columns
        self._tiles.copy_(upload(columns, torch.int32, self._tiles.device))
        self._tiled = tiles

    def clear(self) -> None:
        """Queue the copy of a step without tokens; a pass over it stores nothing."""
        self._copy([], [], None, [])
        self._tiles.zero_()
        self._tiled = []

    def _copy(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int] | np.ndarray,
        pending: PendingTokens | None,
        index: Sequence[StepIndex],
    ) -> None:
        self._turn = (self._turn + 1) % STAGING
        staging, copied = self._staging[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # a step that samples nothing has no other wait
        fill_inputs(staging.numpy(), token_ids, positions, pending, index)
        self._device.copy_(staging, non_blocking=True)
        if copied is not None:
            copied.record()

    def tokens(self, size: int) -> TokenRows[Tensor]:
        """The token columns of a batch of `size` sequences, int32 `[size]` on the device."""
        return TokenRows(*DecodeInputs.of(self._device[:, :size]).tokens)

    def steps(self, size: int, max_blocks: int, max_shared: int = 0) -> Sequence[GroupStep]:
        """Make the index tensors of a batch of `size` sequences, inside the pass that is captured.

        Args:
            max_blocks: bound on the page table entries that sequences of a group read themselves.
            max_shared: bound on those that tiles of a group read; 0: the steps have no tiles.
        """
        groups = DecodeInputs.of(self._device[:, :size]).groups
        tiles = list(self._tiles[:, :, :size]) if max_shared else None
        return self._steps.steps(groups, max_blocks, tiles, max_shared)

    def reading(self, steps: Sequence[GroupStep]) -> AbstractContextManager[None]:
        """Let `cache.attend` read the index from `steps` inside a `with`."""
        return self._steps.reading(steps)
