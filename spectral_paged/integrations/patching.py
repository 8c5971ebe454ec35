"""Replacement of a function in third-party code, in all places that refer to it.

`from x import *` copies a function into other modules, a closure keeps it in a cell, a class has it
as an attribute, and another function as a default argument. Assigning only to the defining module
reaches none of these: they go on calling the original, nothing fails, and the replacement never
runs. So this module finds every reference, replaces all or none, refuses if there is none or if
they are replaced already, and restores each place exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType
from typing import Any

from spectral_paged.errors import PatchError

_WRAPPERS = (staticmethod, classmethod)
_DEFAULTS = ("__defaults__", "__kwdefaults__")
_active: list[Patch] = []


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One replaced reference: attribute `key` of `holder`, and its values before and after."""

    name: str
    holder: Any
    key: str
    original: Any
    replacement: Any


class Patch:
    """A replacement in force at `places`; `undo()` or leaving its `with` block ends it."""

    def __init__(self, old: Callable[..., Any], places: tuple[Place, ...]) -> None:
        self.old = old
        self.places = places
        try:
            for place in places:
                setattr(place.holder, place.key, place.replacement)
        except BaseException:
            for done in places[: places.index(place)]:
                setattr(done.holder, done.key, done.original)
            raise
        _active.append(self)

    def undo(self) -> None:
        """Put the original back in every place; a second call does nothing.

        Raises:
            PatchError: other code changed a place since; then nothing is restored.
        """
        if self not in _active:
            return
        changed = [p.name for p in self.places if _get(p.holder, p.key) is not p.replacement]
        if changed:
            names = ", ".join(changed)
            raise PatchError(f"{names} was changed since this patch: undo the later patch first")
        for place in self.places:
            setattr(place.holder, place.key, place.original)
        _active.remove(self)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def replace_everywhere(
    old: Callable[..., Any],
    new: Callable[..., Any],
    *,
    modules: Iterable[ModuleType] | None = None,
) -> Patch:
    """Replace each reference to `old` in `modules` by `new`.

    The search covers module globals, class attributes (static and class methods too), and closure
    cells and default arguments of every function found there. It does not cover containers and
    instances: patch before a model is built. `new` may call the original, because its own
    references are not replaced.

    Args:
        modules: imported modules to search; default all of `old`'s top-level package.

    Raises:
        PatchError: nothing refers to `old`, or it is replaced already; nothing is changed.
    """
    label = f"{getattr(old, '__module__', '?')}.{getattr(old, '__qualname__', repr(old))}"
    if old is new or any(patch.old is old for patch in _active):
        raise PatchError(f"{label} is replaced already: undo that patch first")
    if modules is None:
        package = str(getattr(old, "__module__", "")).partition(".")[0]
        modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == package]
    searched = list(dict.fromkeys(modules))
    places = tuple(_find(searched, old, new))
    if not places:
        names = ", ".join(sorted(m.__name__ for m in searched)) or "no module"
        raise PatchError(
            f"nothing refers to {label} in {names}: import the modules that use it, and pass them"
        )
    return Patch(old, places)


def _find(modules: list[ModuleType], old: object, new: object) -> Iterator[Place]:
    """Each reference to `old` that can be reached from `modules`, once."""
    pending: list[tuple[str, Any]] = [(m.__name__, m) for m in modules]
    seen = {id(old), id(new)}  # cells too: sibling closures share them
    while pending:
        owner, thing = pending.pop()
        for name, holder, key in _references(owner, thing):
            value = _get(holder, key)
            replacement = _replaced(value, old, new, in_default=key in _DEFAULTS)
            inner = value.__func__ if isinstance(value, _WRAPPERS) else value
            if replacement is not value:
                if not isinstance(holder, CellType) or id(holder) not in seen:
                    seen.add(id(holder))
                    yield Place(name, holder, key, value, replacement)
            elif isinstance(inner, FunctionType | type) and id(inner) not in seen:
                seen.add(id(inner))
                pending.append((name, inner))


def _references(owner: str, thing: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, holder and key of each direct reference of a module, class or function."""
    yield from ((f"{owner}.{key}", thing, key) for key in list(vars(thing)))
    if isinstance(thing, FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        for name, cell in cells:
            if cell != CellType():  # the cell of a name that is not bound yet
                yield f"{owner} closure {name}", cell, "cell_contents"
        yield from ((f"{owner}.{key}", thing, key) for key in _DEFAULTS)


def _get(holder: Any, key: str) -> Any:
    raw = isinstance(holder, ModuleType | type)  # a static method as it is stored, not unwrapped
    return vars(holder).get(key) if raw else getattr(holder, key)


def _replaced(value: Any, old: object, new: Any, *, in_default: bool) -> Any:
    """`value` with `old` replaced by `new`; `value` itself where it does not refer to `old`."""
    if value is old:
        return new
    if isinstance(value, _WRAPPERS) and value.__func__ is old:
        return type(value)(new)
    if in_default and isinstance(value, tuple) and any(x is old for x in value):
        return tuple(new if x is old else x for x in value)
    if in_default and isinstance(value, dict) and any(x is old for x in value.values()):
        return {key: new if x is old else x for key, x in value.items()}
    return value
