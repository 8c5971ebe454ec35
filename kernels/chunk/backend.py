"""A chunk backend attends to prompt chunks by the kernel of one library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.math.scores import Scores

HALF_TYPES = (torch.float16, torch.bfloat16)
MAX_DIM = 256  # the widest head that FlashAttention takes


@dataclass(frozen=True, slots=True)
class ChunkKind:
    """The chunks that a backend is asked for.

    dtype, dim, device: of queries, keys and values; `dim` is the head width.
    softcap, window: as in `chunk.reference.chunk_attention`.
    has_sinks: True if there are sinks.
    """

    dtype: torch.dtype
    dim: int
    device: torch.device
    softcap: float | None = None
    window: int | None = None
    has_sinks: bool = False

    def flash_obstacle(self) -> str | None:
        """Why no FlashAttention takes these chunks, whatever its build; None if one may."""
        if self.dtype not in HALF_TYPES:
            return f"takes fp16 and bf16, not {self.dtype}"
        if self.dim > MAX_DIM or self.dim % 8:
            return f"takes heads of a multiple of 8 up to {MAX_DIM}, not {self.dim}"
        return None


class ChunkBackend(Protocol):
    """A module of this folder, or an object like one."""

    def obstacle(self, kind: ChunkKind, /) -> str | None:
        """Why the backend does not attend to these chunks here, as words after its name; None if
        it does."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: ChunkSpans,
        scores: Scores,
        window: int | None,
        sinks: Tensor | None = None,
        /,
    ) -> Tensor:
        """Attend with q `[T, Hq, D]` to k, v `[L, Hkv, D]` and sinks `[Hq]`; returns `[T, Hq, D]`
        in q's dtype or fp32. Strides are free but for the last, which is 1."""
        ...


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) off CUDA."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
