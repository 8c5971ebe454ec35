"""Another attention for a model, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def use_attention(model: Any, implementation: str) -> Iterator[None]:
    """The transformers model attends by `implementation` inside, and as before afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
