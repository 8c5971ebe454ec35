"""vLLM's CUDA graphs of decode steps, several a batch size, for different numbers of page reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    ModelCudaGraphManager,
)

from spectral_paged.integrations.vllm.runtime import PagedRuntime
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.models.decode_graphs import graph_capacities


@dataclass(frozen=True)
class RoomDescriptor(BatchExecutionDescriptor):
    """A batch as vLLM describes it, with room for so many page table entries."""

    room: int = 0

    @classmethod
    def of(cls, desc: BatchExecutionDescriptor, room: int) -> RoomDescriptor:
        own = {field.name: getattr(desc, field.name) for field in fields(BatchExecutionDescriptor)}
        return cls(**own, room=room)


class _Rooms(CudaGraphManager):
    """Captures each FULL graph once a room, and replays the smallest that a step fits in.

    Kernels start programs for every entry that a graph has room for, and the memory between
    kernels grows with it (decision 0019). vLLM chooses graphs by batch size alone.
    """

    _runtime: PagedRuntime
    _max_blocks: int  # of the longest sequence
    _capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]]

    def rooms(self, num_seqs: int) -> list[int]:
        """The rooms of a batch of `num_seqs` sequences, ascending; the last is never exceeded."""
        most = num_seqs * self._max_blocks
        return [min(room, most) for room in graph_capacities(most)]

    def capture(self, create_forward_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        def in_room(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[..., Any]:
            if isinstance(desc, RoomDescriptor):
                self._runtime.room = desc.room
            return create_forward_fn(desc, warmup=warmup)

        every = self._capture_descs
        full = every.get(CUDAGraphMode.FULL, [])
        # largest first, as vLLM does, so that smaller ones fit in memory that is there already
        inside = [
            RoomDescriptor.of(desc, room)
            for desc in full
            for room in reversed(self.rooms(desc.num_tokens))
        ]
        try:
            self._capture_descs = {**every, CUDAGraphMode.FULL: inside} if full else every
            super().capture(in_room, *args, **kwargs)
        finally:
            self._capture_descs = every

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        reads = self._runtime.num_blocks
        room = next(room for room in self.rooms(desc.num_tokens) if room >= reads)
        self._runtime.num_replays += 1
        return super().run_fullgraph(RoomDescriptor.of(desc, room))


class SpectralCudaGraphs(ModelCudaGraphManager, _Rooms):
    """vLLM's graphs of the whole model; `ModelCudaGraphManager` asks `_Rooms` for each of them."""

    @classmethod
    def adopt(cls, manager: ModelCudaGraphManager, max_model_len: int) -> SpectralCudaGraphs:
        """Turn vLLM's manager into one with rooms, before anything is captured."""
        manager.__class__ = cls
        manager._runtime = PagedRuntime.get()
        manager._max_blocks = -(-max_model_len // BLOCK_TOKENS)
        return manager
