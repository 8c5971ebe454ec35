"""Hooks that call a cache at the beginning and the end of each forward of a decoder."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class WatchingCache(Protocol):
    """A cache for which a forward is one step."""

    def begin_forward(self, decoder: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Called before the first layer; returns the inputs that the decoder takes."""
        ...

    def end_forward(self, *, failed: bool) -> None:
        """Called after the last layer, or after a layer raised (`failed`)."""
        ...


def watch(decoder: Any) -> None:
    """Hook `decoder` so that its forwards call a `WatchingCache` passed as `past_key_values`.

    Other forwards do not change. A second call does nothing.
    """
    if _before in decoder._forward_pre_hooks.values():
        return
    decoder.register_forward_pre_hook(_before, with_kwargs=True)
    decoder.register_forward_hook(_after, with_kwargs=True, always_call=True)


def _before(
    decoder: Any, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if args:  # by their names, as causal LMs pass them
        names = inspect.signature(decoder.forward).parameters
        inputs = inputs | dict(zip(names, args, strict=False))
    cache = inputs.get("past_key_values")
    if not isinstance(cache, WatchingCache):
        return None
    return (), cache.begin_forward(decoder, inputs)


def _after(decoder: Any, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> None:
    cache = inputs.get("past_key_values")
    if isinstance(cache, WatchingCache):
        cache.end_forward(failed=output is None)
