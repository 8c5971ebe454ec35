"""Record of a GGUF file's used keys: one that changes computation or tokens is used or refused.

A key counts as used because the conversion read it, not because a list names it. `finish` refuses
the keys that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spectral_paged.errors import CorruptFileError, UnsupportedModelError, cut, shown

T = TypeVar("T")
REMEDY = "take another GGUF of the model, or its safetensors folder"


class Keys:
    """The metadata of one file, and a record of the keys that were used.

    Args:
        prefix: the architecture's name and a dot; keys below it change computation, and those below
            `tokenizer.` and `split.` change tokens and weights.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], prefix: str) -> None:
        self.path, self.prefix = path, prefix
        self._metadata = metadata
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._full(key) in self._metadata

    def _full(self, key: str) -> str:
        """The full key: `attention.scale` -> `llama.attention.scale`; other namespaces stay."""
        return key if key.startswith(("general.", "tokenizer.", "split.")) else self.prefix + key

    def _raw(self, key: str) -> Any:
        self._used.add(self._full(key))
        return self._metadata.get(self._full(key))

    def integer(self, key: str, default: int | None = None, *, least: int = 0) -> int:
        """The value of an integer key, from `least` to 2^31 - 1.

        A list whose entries are equal counts as one integer.

        Raises:
            CorruptFileError: the key is missing without a default, or has another type or range.
            UnsupportedModelError: the entries of a list differ.
        """
        found = self._raw(key)
        if isinstance(found, np.ndarray) and found.size and found.dtype.kind in "iu":
            if len(set(found.tolist())) > 1:
                raise UnsupportedModelError(
                    f"{self.path}: {self._full(key)} differs between layers "
                    f"({shown(found.tolist())}), which this version does not serve: {REMEDY}"
                )
            found = found[0].item()
        return self._checked(key, found, default, int, lambda value: least <= value < 1 << 31)

    def number(self, key: str, default: float | None = None) -> float:
        """The value of a number key, which must be finite.

        Raises:
            CorruptFileError: the key is missing without a default, or has another type.
        """
        found = self._raw(key)
        found = float(found) if type(found) is int else found
        return self._checked(key, found, default, float, lambda value: abs(value) < float("inf"))

    def string(self, key: str, default: str | None = None) -> str:
        return self._checked(key, self._raw(key), default, str)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return self._checked(key, self._raw(key), default, bool)

    def strings(self, key: str) -> list[str] | None:
        """The value of a key that is a list of strings; None where the key is missing."""
        if self._full(key) not in self._metadata:
            self._used.add(self._full(key))
            return None
        return self._checked(key, self._raw(key), None, list)

    def vector(self, key: str) -> np.ndarray[Any, Any] | None:
        """The value of a key that is a list of numbers; None where the key is missing."""
        if self._full(key) not in self._metadata:
            self._used.add(self._full(key))
            return None
        return self._checked(key, self._raw(key), None, np.ndarray)

    def _checked(
        self, key: str, found: Any, default: T | None, kind: type[T], fits: Any = None
    ) -> T:
        if found is None and default is not None:
            return default
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            lacks = "is missing" if found is None else f"is {shown(found)}, no {kind.__name__}"
            raise CorruptFileError(
                f"{self.path}: {self._full(key)} {lacks}: fetch the file again, or {REMEDY}"
            )
        if fits is not None and not fits(found):
            raise CorruptFileError(
                f"{self.path}: {self._full(key)} is {shown(found)}, which no model has: fetch the "
                f"file again, or {REMEDY}"
            )
        return found

    def below(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, a whole name."""
        return [key for key in self._metadata if key.startswith(prefix)]

    def is_list(self, key: str) -> bool:
        return isinstance(self._metadata.get(self._full(key)), np.ndarray)

    def expect(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse a key whose value is not one of `allowed`, with which it changes nothing.

        Args:
            why: the effect of another value, for the message.

        Raises:
            UnsupportedModelError: the message names the key, its value and its effect.
        """
        found = self._raw(key)
        if isinstance(found, np.ndarray):  # one a layer: all of them have to be allowed
            values = found.tolist()
        else:
            values = [] if found is None else [found]
        if any(not any(_same(value, one) for one in allowed) for value in values):
            raise UnsupportedModelError(
                f"{self.path}: {self._full(key)} is {shown(found)}, so {why}, which this version "
                f"does not serve (it reads {shown(allowed[0])}): {REMEDY}"
            )

    def skip(self, *keys: str) -> None:
        """Count keys that change nothing as used."""
        self._used |= {self._full(key) for key in keys}

    def finish(self) -> None:
        """Refuse the file if an unused key may change computation or tokens.

        Raises:
            UnsupportedModelError: the message names the first five such keys.
        """
        counted = (self.prefix, "tokenizer.", "split.", "adapter.")
        left = [key for key in self._metadata if key.startswith(counted) and key not in self._used]
        if left:
            values = ", ".join(f"{cut(key, 80)} = {shown(self._metadata[key])}" for key in left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise UnsupportedModelError(
                f"{self.path} has keys that this version does not know, so its model or tokenizer "
                f"may differ from what would be served: {values}{more}: {REMEDY}"
            )


def _same(found: Any, allowed: Any) -> bool:
    if isinstance(found, bool) or isinstance(allowed, bool):
        return found is allowed
    if isinstance(found, float) and isinstance(allowed, int | float):
        return abs(found - allowed) <= 1e-6 * abs(allowed)
    return bool(found == allowed)


def names(found: Sequence[str]) -> str:
    """The first three of some names, and the number of the others."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(name[:200] for name in found[:3]) + more
