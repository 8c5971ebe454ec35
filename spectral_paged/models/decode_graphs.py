"""Decode steps run as CUDA graphs over static inputs.

There is one graph for each batch size and number of page reads, of sequences and of tiles that read
shared pages, captured when first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from spectral_paged.cache import SpectralKVCache
from spectral_paged.device import upload
from spectral_paged.models.lora import TokenAdapters
from spectral_paged.models.static_inputs import StaticInputs
from spectral_paged.sampling import PendingTokens

Forward = Callable[[Tensor, Tensor], Tensor]


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


def known_tokens(ids: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
    """Return `ids`, replaced by `sampled[sources]` where `sources` is not negative; int64 `[n]`."""
    return torch.where(sources < 0, ids.long(), sampled[sources.clamp_min(0)])


class DecodeGraphs:
    """Captures and replays decode steps (decision 0019).

    Inputs of all graphs are in one static tensor (`StaticInputs`). Graphs share their memory,
    because they run one after the other.

    Args:
        cache: graphs read and write its tables and arenas.
        forward: returns logits `[n, vocab]` for input ids and positions, int64 `[n]`. Its attention
            calls `cache.attend`.
        adapters: what layers read of tokens' LoRA adapters. Steps without any have graphs of their
            own, which compute none.
        max_rows: tokens of the largest step; None: one of each sequence.
    """

    def __init__(
        self,
        cache: SpectralKVCache,
        forward: Forward,
        adapters: TokenAdapters | None = None,
        max_rows: int | None = None,
    ) -> None:
        self.cache = cache
        self.forward = forward
        self._adapters = adapters
        self._max_rows = most = max_rows or cache.max_num_seqs
        self._indices = torch.zeros(most, dtype=torch.int32, device=cache.device)
        self.sizes = batch_sizes(most)
        self._inputs = StaticInputs(cache, most)
        self._sampled = torch.zeros(most, dtype=torch.int64, device=cache.device)
        self._logits: Tensor | None = None
        self._graphs: dict[tuple[int, int, int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.num_replays = 0

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def drop(self) -> None:
        """Forget all graphs and free their memory, because what they read lies elsewhere later."""
        self._graphs.clear()
        self._logits = None
        self._pool = torch.cuda.graph_pool_handle()

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int] | np.ndarray,
        pending: PendingTokens | None,
        adapters: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the cache's open step, whose tokens attend one by one, and return its logits.

        fp32 `[n, vocab]`; the next call overwrites them.

        Args:
            adapters: as `ModelRunner.forward` takes them, but of each token.
        """
        size = next(size for size in self.sizes if size >= len(token_ids))
        blocks = graph_capacity(self._inputs.own_blocks)
        shared = graph_capacity(self._inputs.tile_blocks)
        graph = self.prepare(size, blocks, shared, adapted=adapters is not None)
        self._inputs.fill(token_ids, positions, pending)
        if adapters is not None:
            padded = [*adapters, *[0] * (size - len(adapters))]
            self._indices[:size] = upload(padded, torch.int32, self.cache.device)
        if pending is not None:
            self._sampled[: len(pending.ids)] = pending.ids
        graph.replay()
        self.num_replays += 1
        assert self._logits is not None
        return self._logits[: len(token_ids)]

    def prepare(
        self, size: int, max_blocks: int, max_shared: int = 0, *, adapted: bool = False
    ) -> torch.cuda.CUDAGraph:
        """Return the graph of `size` sequences and up to `max_blocks` page reads, captured once.

        Args:
            max_shared: page reads of tiles; 0: without tiles, so that a step that shares nothing
                launches nothing for it.
            adapted: with the products of LoRA adapters.
        """
        key = size, max_blocks, max_shared, adapted
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def prepare_tiles(self) -> None:
        """Capture one graph with tiles, if the cache may have any, so that their kernels are
        compiled before a step waits for them."""
        if self._inputs.has_tiles:
            self.prepare(2, graph_capacity(1), graph_capacity(1))

    def _capture(
        self, size: int, max_blocks: int, max_shared: int, adapted: bool
    ) -> torch.cuda.CUDAGraph:
        """Capture the step of a batch of `size` with up to `max_blocks` page reads of sequences.

        The step runs once before the capture, so that kernels are compiled and loaded. Its
        sequences have no tokens, so nothing is stored.
        """
        self._inputs.clear()
        self._step(size, max_blocks, max_shared, adapted)
        graph = torch.cuda.CUDAGraph()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            graph.capture_begin(pool=self._pool)
            try:
                self._step(size, max_blocks, max_shared, adapted)
            finally:
                graph.capture_end()
        current.wait_stream(side)
        return graph

    def _step(self, size: int, max_blocks: int, max_shared: int, adapted: bool) -> None:
        tokens = self._inputs.tokens(size)
        ids = known_tokens(tokens.ids, tokens.sources, self._sampled)
        steps = self._inputs.steps(size, max_blocks, max_shared)
        own: AbstractContextManager[None] = nullcontext()
        if adapted:
            assert self._adapters is not None, "the model has places for adapters"
            own = self._adapters.of(self._indices[:size])
        with self._inputs.reading(steps), own:
            logits = self.forward(ids, tokens.positions.long())
        if self._logits is None:
            shape = self._max_rows, logits.shape[-1]
            self._logits = torch.empty(shape, dtype=torch.float32, device=logits.device)
        self._logits[:size] = logits
