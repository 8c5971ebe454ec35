"""The store's CUDA: pinned memory, and copies on streams of their own beside the model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_paged.errors import CapacityError
from spectral_paged.store.copies import join, scatter


def pin(memory: Tensor) -> None:
    """Let the device copy from and to a tensor of the host without the host's help.

    Raises:
        CapacityError: the driver refuses.
    """
    cudart: Any = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if code:
        raise CapacityError(
            f"{memory.numel()} bytes of host memory cannot be pinned (CUDA error {code}): lower "
            "kv_host_memory, or raise the limit of locked memory (ulimit -l)"
        )


def unpin(memory: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(memory.data_ptr())


class CudaCopy:
    """A copy that a stream makes; `is_done` asks without waiting.

    Args:
        event: recorded behind the copy.
        device: whose stream waits in `hold`.
        kept: tensors that the copy reads or writes, kept until it is done.
    """

    def __init__(self, event: torch.cuda.Event, device: torch.device, kept: list[Tensor]) -> None:
        self._event, self._device = event, device
        self._kept = kept

    failed = False

    @property
    def is_done(self) -> bool:
        if self._kept and self._event.query():
            self._kept = []
        return not self._kept

    def wait(self) -> None:
        """Wait on the host."""
        self._event.synchronize()
        self._kept = []

    def hold(self) -> None:
        """Let later work of the current stream wait for the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaCopier:
    """Copies between a device and pinned memory, on one stream out and one stream in.

    What goes out is first put together on the current stream, at the speed of device memory. Its
    places may then be overwritten by later work of that stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def save(self, views: Sequence[Tensor], pieces: Sequence[Tensor]) -> CudaCopy:
        """Copy the bytes of `views` to the host's `pieces`, in order."""
        flat = join(views)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for source, piece in zip(
                flat.split([len(piece) for piece in pieces]), pieces, strict=True
            ):
                piece.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return CudaCopy(event, self._device, [flat, *pieces])

    def load(self, pieces: Sequence[Tensor], views: Sequence[Tensor | int]) -> CudaCopy:
        """Copy the host's `pieces` to `views`, in order; a number skips so many bytes."""
        self._in.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._in):
            lengths = [len(piece) for piece in pieces]
            flat = torch.empty(sum(lengths), dtype=torch.uint8, device=self._device)
            for target, piece in zip(flat.split(lengths), pieces, strict=True):
                target.copy_(piece, non_blocking=True)
            scatter(flat, views)
            event = torch.cuda.Event()
            event.record()
        return CudaCopy(event, self._device, [flat, *pieces])
