"""Small copies between host and device that stop neither of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(
    values: Sequence[Any] | np.ndarray[Any, Any] | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`values` as a tensor on `device`.

    A copy to CUDA goes through pinned memory and is queued behind the stream's work, because a
    plain `torch.tensor(..., device="cuda")` waits until the stream is empty.
    """
    if device.type != "cuda":
        return torch.as_tensor(values, dtype=dtype, device=device)
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def upload_rows(rows: np.ndarray[Any, Any], device: torch.device) -> tuple[Tensor, ...]:
    """The rows of an int32 array `[R, N]` on `device`, in one copy.

    Each row starts at a multiple of 128 bytes, because Triton specialises on pointer alignment.
    """
    count = rows.shape[1]
    padded = np.zeros((len(rows), -(-count // 32) * 32), dtype=np.int32)
    padded[:, :count] = rows
    return upload(padded, torch.int32, device)[:, :count].unbind()


class Download:
    """A copy of tensors to the host, queued when the object is made.

    On CUDA, `get` waits for the copies only, not for work queued after them. Later work of the
    same stream may overwrite the tensors on the device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._found = tensors
            return
        self._found = tuple(
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        )
        self._event = torch.cuda.Event()
        self._event.record()

    @property
    def is_here(self) -> bool:
        """True if `get` need not wait."""
        return self._event is None

    def get(self) -> tuple[Tensor, ...]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._found
