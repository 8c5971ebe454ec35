"""A model computes in fp32 for a while, whatever dtype its weights have.

A module has fp32 copies of its parameters only while it runs, so memory grows by the largest
module's and not by the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """Let every module of `model` compute in fp32 inside a `with` block.

    Weights of 16 bits are exact in fp32, so a checkpoint computes the same in every dtype that
    holds it exactly.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            narrow = [
                parameter
                for parameter in module.parameters(recurse=False)
                if parameter.is_floating_point() and parameter.dtype != torch.float32
            ]
            if narrow:
                widened = _Widened(narrow)
                for handle in (
                    module.register_forward_pre_hook(widened.begin),
                    module.register_forward_hook(widened.end, always_call=True),
                ):
                    hooks.callback(handle.remove)
                hooks.callback(widened.end)
        yield


class _Widened:
    """The parameters of one module, and the tensors that they have outside of its forward."""

    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters
        self._own: list[Tensor] = []

    def begin(self, *_: object) -> None:
        if not self._own:
            self._own = [parameter.data for parameter in self._parameters]
            for parameter, own in zip(self._parameters, self._own, strict=True):
                parameter.data = own.float()

    def end(self, *_: object) -> None:
        for parameter, own in zip(self._parameters, self._own, strict=False):
            parameter.data = own
        self._own = []
