"""Methods that are called back without keeping their object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def weak_method(method: Callable[P, R]) -> Callable[P, R]:
    """What calls a bound `method` for as long as somebody else holds its object.

    A part that calls back the owner it belongs to would otherwise hold it in a circle, and the
    memory of both would stay taken until garbage is collected, which no full GPU brings about.

    Raises:
        ReferenceError: when called after the object is gone.
    """
    held = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        found = held()
        if found is None:
            raise ReferenceError(f"{name} is called back, but its object is gone")
        return found(*args, **kwargs)

    name = method.__qualname__
    return call
