"""One piece of host memory, cut into frames of equal size, in which records lie."""

from __future__ import annotations

import mmap
import weakref
from typing import Self

import torch
from torch import Tensor

from spectral_paged.errors import CapacityError
from spectral_paged.store.cuda import pin, unpin

POISON = 0xFF  # NaN in every float
MAX_FRAME_BYTES = 4 << 20
FRAME_ALIGNMENT = 128


class HostMemory:
    """Frames of host memory, allocated once and given back to the system by `close`.

    With CUDA the memory is pinned, so that copies run beside the host. It is mapped and pinned by
    hand, because PyTorch's allocator of pinned memory takes powers of two and keeps what it took.

    Args:
        num_bytes: bytes at most; whole frames are used.
        frame_bytes: bytes of a frame.
        pinned: pin the memory.
        poison: fill frames with NaN bytes when they become free.

    Raises:
        CapacityError: the system has not so much memory, or does not pin so much.
    """

    def __init__(
        self, num_bytes: int, frame_bytes: int, *, pinned: bool = False, poison: bool = False
    ) -> None:
        self.frame_bytes = frame_bytes
        self.num_frames = num_bytes // frame_bytes
        self._poison = poison
        size = self.num_frames * frame_bytes
        try:
            memory = mmap.mmap(-1, size)
        except (OSError, ValueError) as error:
            raise CapacityError(
                f"{size} bytes of host memory for pages cannot be had ({error}): lower "
                "kv_host_memory"
            ) from error
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self._frames = flat.view(self.num_frames, frame_bytes)
        self._free = list(range(self.num_frames - 1, -1, -1))
        self._unpin = None
        if pinned:
            pin(flat)
            self._unpin = weakref.finalize(self, unpin, flat)
            self._unpin.atexit = False  # the process ends, and CUDA may be gone by then
        if poison:
            flat.fill_(POISON)

    @classmethod
    def of(
        cls, num_bytes: int, *, largest: int, usual: int, device: torch.device, poison: bool
    ) -> Self:
        """Memory of `num_bytes` bytes below a cache on `device`, in frames that fit its records.

        Args:
            largest, usual: bytes of the largest record, and of most records.

        Raises:
            CapacityError: it would not hold one record of each size, or cannot be had.
        """
        frame_bytes = -(-usual // (-(-usual // MAX_FRAME_BYTES)))
        frame_bytes = -(-frame_bytes // FRAME_ALIGNMENT) * FRAME_ALIGNMENT
        least = sum(-(-size // frame_bytes) * frame_bytes for size in (largest, usual))
        if num_bytes < least:
            raise CapacityError(
                f"kv_host_memory is {num_bytes} bytes; a prefix of this cache takes at least "
                f"{least}: give more, or leave it out"
            )
        return cls(num_bytes, frame_bytes, pinned=device.type == "cuda", poison=poison)

    @property
    def num_bytes(self) -> int:
        return self.num_frames * self.frame_bytes

    @property
    def num_free(self) -> int:
        return len(self._free)

    def frames_of(self, num_bytes: int) -> int:
        """The number of frames that so many bytes take."""
        return -(-num_bytes // self.frame_bytes)

    def take(self, count: int) -> list[int] | None:
        """The numbers of `count` frames; None if fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, frames: list[int]) -> None:
        if self._poison:
            for frame in frames:
                self._frames[frame].fill_(POISON)
        self._free += frames

    def pieces(self, frames: list[int], num_bytes: int) -> list[Tensor]:
        """The bytes of a record of `num_bytes` bytes, uint8 tensors, one a frame."""
        last = num_bytes - (len(frames) - 1) * self.frame_bytes
        found = [self._frames[frame] for frame in frames]
        found[-1] = found[-1][:last]
        return found

    def close(self) -> None:
        """Unpin the memory and give it back; nobody may use its frames any more."""
        if self._unpin is not None:
            self._unpin()
        self._frames = self._frames.new_empty(0, self.frame_bytes)
        self._free, self.num_frames = [], 0
