"""The arguments of an engine as one value, under vLLM's name."""

from __future__ import annotations

from os import PathLike
from typing import Any

from spectral_paged.options.declared import DEFAULT_MODEL, LLMOptions


class EngineArgs:
    """A model and the options of an `LLM` over it.

    Args:
        model: as `LLM` takes it.
        **options: the fields of `LLMOptions`.

    Raises:
        TypeError: an option does not exist.
        InvalidRequestError: an option has a value of another type.
    """

    def __init__(self, model: str | PathLike[str] = DEFAULT_MODEL, **options: Any) -> None:
        self.model = model
        self.options = LLMOptions.of(EngineArgs, None, options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EngineArgs) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"EngineArgs({self.model!r}, {self.options!r})"
