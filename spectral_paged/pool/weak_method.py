"""A weak method is a callback that does not keep its object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class WeakMethod(Generic[P, R]):
    """A callable that calls a bound `method` while its object is alive.

    A part that kept a bound method of its owner would form a reference cycle with it. The memory
    of both would stay allocated until Python collects garbage, which a full GPU does not trigger.
    A copy of owner and part calls the copied owner.

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
