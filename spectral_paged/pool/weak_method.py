"""Methods that are called back without keeping their object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class WeakMethod(Generic[P, R]):
    """What calls a bound `method` for as long as somebody else holds its object.

    A part that calls back the owner it belongs to would otherwise hold it in a circle, and the
    memory of both would stay taken until garbage is collected, which no full GPU brings about. A
    copy of both calls the copied owner.

    Raises:
        ReferenceError: when called after the object is gone.
    """

    def __init__(self, method: Callable[P, R]) -> None:
        self._held = weakref.WeakMethod(method)
        self._name = method.__qualname__

    def _method(self) -> Callable[P, R]:
        found = self._held()
        if found is None:
            raise ReferenceError(f"{self._name} is called back, but its object is gone")
        return found

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._method()(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._method(),)
