"""Hooks that call a cache when `generate` begins, and around each forward of a decoder."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

CACHE_NAMES = "past_key_values", "cache"  # of transformers' argument: older releases, newer ones


@runtime_checkable
class WatchingCache(Protocol):
    """A cache for which a forward is one step."""

    def begin_generate(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Called before `generate` reads anything of the cache, with the ids `[B, T]` it got."""
        ...

    def begin_forward(self, decoder: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Called before the first layer; returns the inputs that the decoder takes."""
        ...

    def end_forward(self, *, failed: bool) -> None:
        """Called after the last layer, or after a layer raised (`failed`)."""
        ...


def watch(decoder: Any) -> None:
    """Hook `decoder` so that its forwards call a `WatchingCache` passed by one of `CACHE_NAMES`.

    Other forwards do not change. A second call does nothing.
    """
    if _before in decoder._forward_pre_hooks.values():
        return
    decoder.register_forward_pre_hook(_before, with_kwargs=True)
    decoder.register_forward_hook(_after, with_kwargs=True, always_call=True)


def watch_generate(model: Any) -> None:
    """Make `model.generate` call a `WatchingCache` passed by one of `CACHE_NAMES` first.

    Only `generate` has all ids of a prompt: it cuts off as many as the cache has columns, whatever
    these contain. A second call does nothing.
    """
    if "generate" not in vars(model):
        model.generate = MethodType(generate, model)  # copies of the model have their own


def generate(self: Any, *args: Any, **options: Any) -> Any:
    """Call `generate` of the model's class, after the cache's `begin_generate`."""
    cache, input_ids = _cache_in(options), options.get("input_ids")
    if input_ids is None:
        input_ids = args[0] if args else options.get("inputs")
    if cache is not None and input_ids is not None:
        cache.begin_generate(input_ids, options.get("attention_mask"))
    return type(self).generate(self, *args, **options)


def _cache_in(options: dict[str, Any]) -> WatchingCache | None:
    found = (options.get(name) for name in CACHE_NAMES)
    return next((cache for cache in found if isinstance(cache, WatchingCache)), None)


def _before(
    decoder: Any, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if args:  # by their names, as causal LMs pass them
        names = inspect.signature(decoder.forward).parameters
        inputs = inputs | dict(zip(names, args, strict=False))
    cache = _cache_in(inputs)
    if cache is None:
        return None
    return (), cache.begin_forward(decoder, inputs)


def _after(decoder: Any, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> None:
    cache = _cache_in(inputs)
    if cache is not None:
        cache.end_forward(failed=output is None)
