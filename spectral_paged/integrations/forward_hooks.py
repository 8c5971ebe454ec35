"""Hooks by which a decoder's forwards tell their cache where they begin and end."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class WatchingCache(Protocol):
    """A cache for which a forward is one step."""

    def begin_forward(self, decoder: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Before the first layer; the inputs as the decoder is to take them."""
        ...

    def end_forward(self, *, failed: bool) -> None:
        """After the last layer, or after what went wrong before."""
        ...


def watch(decoder: Any) -> None:
    """Let forwards of `decoder` with a `WatchingCache` as `past_key_values` call it.

    Other forwards are left alone; a second call does nothing.
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
