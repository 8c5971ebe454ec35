"""Fields of dataclasses become options of the command line, with the docstring as their help.

```
@dataclass
class Settings:
    '''...

    Args:
        max_seconds: the longest time in seconds.
    '''

    max_seconds: int = field(default=60, metadata=option(positive))

add_options(parser, Settings)           # --max-seconds, with the docstring's words as help
Settings(**given_options(args, Settings))
```
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from spectral_paged.options.readers import parse_bytes

_KEY = "option"


def option(
    read: Callable[[str], Any] = str, *, name: str = "", also: Sequence[str] = (), **how: Any
) -> Mapping[str, Any]:
    """Return the metadata of a dataclass field that is an option of the command line.

    The option's help is what the docstring of the dataclass says of the field. A field whose
    default is None says there what that stands for.

    Args:
        read: makes the value of its text; `bool` makes a pair of flags, `--name` and `--no-name`.
        name: the option, where it is not called like the field.
        also: further names of the option.
        how: further keywords of `add_argument`.
    """
    keywords = {"action": argparse.BooleanOptionalAction} if read is bool else {"type": read}
    return {_KEY: (name, also, keywords | how)}


def option_fields(options: type) -> list[Field[Any]]:
    """Return the fields of a dataclass that are options."""
    return [field for field in fields(options) if _KEY in field.metadata]


def further_names(options: type) -> dict[str, str]:
    """Return fields of a dataclass by the further names of their options, as a call has them."""
    found = {}
    for field in option_fields(options):
        for name in field.metadata[_KEY][1]:
            if name.startswith("--"):
                found[name.removeprefix("--").replace("-", "_")] = field.name
    return found


def add_options(parser: argparse._ActionsContainer, options: type, *names: str, **how: Any) -> None:
    """Add options of a dataclass to a command: all of them, or those of the fields in `names`.

    They have no defaults, so that the dataclass has the only ones; the help shows them.

    Args:
        how: further keywords of `add_argument`. A `default` is that of this command alone.
    """
    docs = _attributes(options)
    for field in option_fields(options):
        if names and field.name not in names:
            continue
        name, also, keywords = field.metadata[_KEY]
        keywords = {"type": None} | keywords | how
        own = keywords.pop("default", argparse.SUPPRESS)
        default = field.default if own is argparse.SUPPRESS else own
        said = keywords.pop("help", docs.get(field.name, "")).replace("%", "%%")
        action = parser.add_argument(
            name or f"--{field.name.replace('_', '-')}",
            *also,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=_with_default(said, default, keywords["type"]),
            **keywords,
        )
        action.default = own  # set late: flags would say it in the help a second time


def given_options(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the options of a dataclass that were given, as keywords of it."""
    names = [field.name for field in option_fields(options)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _attributes(options: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say of each attribute."""
    found = {}
    for cls in reversed(options.__mro__):
        for section in re.findall(
            r"^(?:Args|Attributes):\n((?: .*\n?|\n)*)", inspect.cleandoc(cls.__doc__ or ""), re.M
        ):
            for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.M):
                found[name] = " ".join(text.split())
    return found


def _with_default(help: str, default: object, read: object = None) -> str:
    """Add a default to the help of an option, if the help does not say it in words."""
    if "default" in help or default is None or default is MISSING:
        return help
    if isinstance(default, bool):
        text = "on" if default else "off"
    elif read is parse_bytes and isinstance(default, int):
        text = _shown_bytes(default)
    elif isinstance(default, float):
        text = f"{default:g}"
    else:
        text = str(default)
    return f"{help.rstrip('.')} (default: {text.replace('%', '%%')})"


def _shown_bytes(value: int) -> str:
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value % (1 << exponent) == 0:
            return f"{value >> exponent}{unit}"
    return str(value)


class _DefaultsFormatter(argparse.HelpFormatter):
    """Shows the default of each option, as `add_options` does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.help or not action.option_strings or action.default is argparse.SUPPRESS:
            return action.help
        return _with_default(action.help, action.default, action.type)


class CommandParser(argparse.ArgumentParser):
    """A parser of a command: help shows defaults, and options are written in full."""

    def __init__(self, **how: Any) -> None:
        how.setdefault("formatter_class", _DefaultsFormatter)
        how.setdefault("allow_abbrev", False)
        super().__init__(**how)


def with_dashes(words: Sequence[str]) -> list[str]:
    """Write the names of options with dashes: `--max_model_len`, as vLLM takes it too."""
    return [re.sub(r"^--\w[\w-]*", lambda name: name[0].replace("_", "-"), word) for word in words]
