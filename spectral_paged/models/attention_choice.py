"""Attention functions of transformers models, registered by name and replaced temporarily."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface


class FlatAttention(Protocol):
    """Attends to the tokens of one flattened row: a cache, or a step of it."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """q `[T, Hq, D]`, k and v `[T, Hkv, D]` after RoPE, sinks `[Hq]`; returns `[T, Hq, D]`."""
        ...


def register_attention(
    name: str, attend: Callable[..., Any], mask: Callable[..., Any] | None = None
) -> str:
    """Register `attend` under `name` for every transformers model of this process.

    Args:
        mask: makes the mask that `attend` gets; None: transformers makes none.

    Returns:
        `name`, for `set_attn_implementation` and `use_attention`.
    """
    AttentionInterface.register(name, attend)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    return name


def attend_heads(
    to: FlatAttention,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend for one flattened row in the model's shapes.

    q `[1, Hq, T, D]`, k and v `[1, Hkv, T, D]`, sinks `[Hq]`; returns `[1, T, Hq, D]`.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return to.attend(layer, q, k, v, sinks).unsqueeze(0)


@contextmanager
def use_attention(model: Any, implementation: str) -> Iterator[None]:
    """Let a transformers model attend by `implementation` inside, and as before afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
