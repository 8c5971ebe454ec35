"""Weights of a model leave the device for host memory, and come back to the same tensors."""

from __future__ import annotations

from typing import Any

import torch

from spectral_paged.models.stored_tensors import stored_tensors


class ParkedWeights:
    """The weights of a model in host memory, while their memory on the device is free.

    Tensors keep their storages, which are empty meanwhile, so tied weights stay tied and compiled
    layers know them again. Their addresses change: a captured graph is not valid any more.

    Args:
        model: its parameters and buffers are parked at once, packed ones too.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parked: list[tuple[torch.UntypedStorage, Any]] = []
        for _, tensor in stored_tensors(model):
            storage = tensor.untyped_storage()
            if storage.nbytes():  # else it is empty, or shared with a tensor before
                kept = torch.UntypedStorage(storage.nbytes())
                kept.copy_(storage)
                storage.resize_(0)
                self._parked.append((storage, kept))

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(kept.nbytes() for _, kept in self._parked)

    def restore(self) -> None:
        """Bring the weights back. After an error, such as memory that ran out, it may be called
        again, and goes on."""
        while self._parked:
            storage, kept = self._parked[-1]
            storage.resize_(kept.nbytes())
            storage.copy_(kept)
            self._parked.pop()
