"""Modules compute with copies of their weights for a while: in fp32, or on another device.

A module has copies of its weights only while it runs, so memory grows by the largest module's and
not by the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def weight_copies(model: Any, device: torch.device) -> Iterator[None]:
    """Let every module of `model` compute on `device` inside a `with` block, on a CPU in fp32.

    Weights of 16 bits are exact in fp32, so a checkpoint computes the same in every dtype that
    holds it exactly.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any((x.device, x.dtype) != (device, _dtype(x, device)) for x in held):
                copied = _Copied(held, device)
                for handle in (
                    module.register_forward_pre_hook(copied.begin),
                    module.register_forward_hook(copied.end, always_call=True),
                ):
                    hooks.callback(handle.remove)
                hooks.callback(copied.end)
        yield


def _dtype(tensor: Tensor, device: torch.device) -> torch.dtype:
    """Return the dtype that a tensor's copy has on `device`."""
    wide = device.type == "cpu" and tensor.is_floating_point()
    return torch.float32 if wide else tensor.dtype


class _Copied:
    """The tensors of one module, and the values that they have outside of its forward."""

    def __init__(self, tensors: list[Any], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._own: list[Tensor] = []

    def begin(self, *_: object) -> None:
        if not self._own:
            self._own = [tensor.data for tensor in self._tensors]
            for tensor, own in zip(self._tensors, self._own, strict=True):
                tensor.data = own.to(self._device, _dtype(own, self._device))

    def end(self, *_: object) -> None:
        for tensor, own in zip(self._tensors, self._own, strict=False):
            tensor.data = own
        self._own = []
