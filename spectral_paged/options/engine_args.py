"""The arguments of an engine as one value, under vLLM's name."""

from __future__ import annotations

import argparse
from os import PathLike
from typing import Any, Self, TypeVar

from spectral_paged.options.command_line import add_options, given_options
from spectral_paged.options.declared import DEFAULT_MODEL, LLMOptions

Parser = TypeVar("Parser", bound=argparse._ActionsContainer)


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

    @staticmethod
    def add_cli_args(parser: Parser) -> Parser:
        """Add `--model` and the options of an `LLM` to a command, and return its parser."""
        parser.add_argument(
            "--model", default=DEFAULT_MODEL, help="alias, hub id, folder or .gguf file"
        )
        add_options(parser, LLMOptions)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Return the arguments that a command of `add_cli_args` was given."""
        return cls(args.model, **given_options(args, LLMOptions))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EngineArgs) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, {self.options!r})"


class AsyncEngineArgs(EngineArgs):
    """The same, by the name that scripts over `AsyncLLM` import."""
