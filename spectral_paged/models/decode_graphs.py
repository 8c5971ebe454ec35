"""Decode steps run as CUDA graphs over static inputs.

There is one graph for each batch size and number of page reads, captured when first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from spectral_paged.cache import DecodeRows, ReplayedSteps, SpectralKVCache, StepIndex
from spectral_paged.sampling import PendingTokens

NOWHERE = -1
STAGING = 4  # host buffers, so that so many copies to the device may be in flight

Forward = Callable[[Tensor, Tensor], Tensor]
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


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes that graphs are captured for, up to `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def graph_capacity(count: int) -> int:
    """Return the page reads that a graph has room for when a step has `count`."""
    size = 64
    while size < count:
        size *= 16 if size < 1024 else 4
    return size if count else 0


def graph_capacities(count: int) -> list[int]:
    """Return every value of `graph_capacity` up to that of `count`."""
    found = [0]
    while found[-1] < count:
        found.append(graph_capacity(found[-1] + 1))
    return found


def fill_inputs(
    staging: np.ndarray,
    token_ids: Sequence[int],
    positions: Sequence[int],
    pending: PendingTokens | None,
    index: Sequence[StepIndex],
) -> None:
    """Write a decode step into `staging`, `DecodeInputs` of at least as many sequences.

    Args:
        index: the step's index of each layer group; empty if the step has no tokens.
    """
    count = len(token_ids)
    sources = [NOWHERE] * count if pending is None else pending.sources(count)
    tokens, groups = DecodeInputs.of(staging)
    tokens[:, :count] = TokenRows(token_ids, sources, positions)
    tokens[:, count:] = NO_TOKEN
    for rows in groups:
        rows[:, count:] = NO_SEQUENCE
    for rows, group in zip(groups, index, strict=count > 0):
        rows[:, :count] = group.decode


def known_tokens(ids: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
    """Return `ids`, replaced by `sampled[sources]` where `sources` is not negative; int64 `[n]`."""
    return torch.where(sources < 0, ids.long(), sampled[sources.clamp_min(0)])


class DecodeGraphs:
    """Captures and replays decode steps (decision 0019).

    Inputs of all graphs are in one static tensor, so a step needs one copy from the host. Graphs
    share their memory, because they run one after the other.

    Args:
        cache: graphs read and write its tables and arenas.
        forward: returns logits `[n, vocab]` for input ids and positions, int64 `[n]`. Its attention
            calls `cache.attend`.
    """

    def __init__(self, cache: SpectralKVCache, forward: Forward) -> None:
        self.cache = cache
        self.forward = forward
        self.sizes = batch_sizes(cache.max_num_seqs)
        # rows start at multiples of 128 bytes, because Triton specialises on pointer alignment
        self.steps = ReplayedSteps(cache)
        shape = DecodeInputs.num_rows(self.steps.num_groups), -(-cache.max_num_seqs // 32) * 32
        self._inputs = torch.zeros(shape, dtype=torch.int32, device=cache.device)
        self._staging = [
            torch.zeros(shape, dtype=torch.int32, pin_memory=True) for _ in range(STAGING)
        ]
        self._copied = [torch.cuda.Event() for _ in range(STAGING)]
        self._turn = 0
        self._sampled = torch.zeros(cache.max_num_seqs, dtype=torch.int64, device=cache.device)
        self._logits: Tensor | None = None
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.num_replays = 0

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(
        self, token_ids: Sequence[int], positions: Sequence[int], pending: PendingTokens | None
    ) -> Tensor:
        """Run the cache's open step, one token a sequence, and return its logits.

        fp32 `[n, vocab]`; the next call overwrites them.
        """
        index = self.steps.index
        total = max(group.num_blocks for group in index)
        size = next(size for size in self.sizes if size >= len(token_ids))
        graph = self.prepare(size, graph_capacity(total))
        self._turn = (self._turn + 1) % STAGING
        staging = self._staging[self._turn]
        self._copied[self._turn].synchronize()  # a step that samples nothing has no other wait
        fill_inputs(staging.numpy(), token_ids, positions, pending, index)
        self._inputs.copy_(staging, non_blocking=True)
        self._copied[self._turn].record()
        if pending is not None:
            self._sampled[: len(pending.ids)] = pending.ids
        graph.replay()
        self.num_replays += 1
        assert self._logits is not None
        return self._logits[: len(token_ids)]

    def prepare(self, size: int, max_blocks: int) -> torch.cuda.CUDAGraph:
        """Return the graph of `size` sequences and up to `max_blocks` page reads, captured once."""
        key = size, max_blocks
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _capture(self, size: int, max_blocks: int) -> torch.cuda.CUDAGraph:
        """Capture the step of a batch of `size` with up to `max_blocks` page reads.

        The step runs once before the capture, so that kernels are compiled and loaded. Its
        sequences have no tokens, so nothing is stored.
        """
        staging = torch.zeros_like(self._staging[0])
        fill_inputs(staging.numpy(), [], [], None, [])
        self._inputs.copy_(staging)
        self._step(size, max_blocks)
        graph = torch.cuda.CUDAGraph()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            graph.capture_begin(pool=self._pool)
            try:
                self._step(size, max_blocks)
            finally:
                graph.capture_end()
        current.wait_stream(side)
        return graph

    def _step(self, size: int, max_blocks: int) -> None:
        inputs = DecodeInputs.of(self._inputs[:, :size])
        tokens = TokenRows(*inputs.tokens)
        ids = known_tokens(tokens.ids, tokens.sources, self._sampled)
        with self.steps.reading(inputs.groups, max_blocks):
            logits = self.forward(ids, tokens.positions.long())
        if self._logits is None:
            shape = self.cache.max_num_seqs, logits.shape[-1]
            self._logits = torch.empty(shape, dtype=torch.float32, device=logits.device)
        self._logits[:size] = logits
