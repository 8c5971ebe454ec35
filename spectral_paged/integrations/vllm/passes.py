"""A pass of the model says what each layer does with its queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from spectral_paged.cache import GroupStep
from spectral_paged.integrations.vllm.runtime import PagedRuntime


class Pass(Protocol):
    """The attention of all layers in one pass.

    Attributes:
        num_tokens: the first rows of the batch, which are real; vLLM pads some batches.
    """

    num_tokens: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, q `[T, Hq, D]`, k and v `[T, H, D]` after RoPE; returns `[T, Hq, D]`."""
        ...


class OpenPass:
    """A pass over the cache's open step."""

    def __init__(self, runtime: PagedRuntime, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._cache = runtime.cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._cache.attend(layer, q, k, v)


class CapturedPass:
    """A pass over static inputs, which a CUDA graph captures.

    The first layer makes the kernels' tables, inside the pass, so that a replay makes them of what
    the inputs then hold.

    Args:
        num_tokens: sequences of the batch, with one new token each.
        max_blocks: bound on the page table entries that a replay reads.
    """

    def __init__(self, runtime: PagedRuntime, num_tokens: int, max_blocks: int) -> None:
        self.num_tokens = num_tokens
        self._runtime, self._max_blocks = runtime, max_blocks
        self._steps: Sequence[GroupStep] | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = self._runtime.inputs
        if self._steps is None:
            self._steps = inputs.steps(self.num_tokens, self._max_blocks)
        with inputs.reading(self._steps):
            return self._runtime.cache.attend(layer, q, k, v)


class EmptyPass:
    """A pass without sequences, as vLLM's warm-up runs it; every layer returns zeros."""

    num_tokens = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("a pass without tokens attends to nothing")
