"""Options of vLLM on a command line: those that are not served are refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from spectral_paged.errors import cut
from spectral_paged.options import NOT_SERVED, PAGE, TAKEN

FLAGS = ("on", "off", "on off")  # values of flags that ask for nothing


class _NotServed(argparse.Action):
    """Refuses an option of vLLM by name, but for values that ask for nothing."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, neutral: str, instead: str):
        self.neutral, self.instead = neutral.split(), instead
        flag = neutral in FLAGS
        super().__init__(
            option_strings,
            dest,
            nargs=0 if flag else None,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name = option_string or self.option_strings[0]
        given = values if self.nargs is None else "off" if name.startswith("--no-") else "on"
        if given not in self.neutral:
            shown = f"{name} {cut(given)}" if self.nargs is None else name
            parser.error(f"{shown} of vLLM is not served: {self.instead} ({PAGE})")


def refuse_vllm_options(parser: argparse.ArgumentParser) -> None:
    """Have a command refuse by name what vLLM has and this has not; help does not show it."""
    for instead, options in NOT_SERVED.items():
        for names, neutral in options.items():
            _add(parser, names.split(), neutral, instead)
    for name in TAKEN:
        _add(parser, [name], "on off", "")


def _add(parser: argparse.ArgumentParser, names: Sequence[str], neutral: str, instead: str) -> None:
    strings = [n for n in names if n not in parser._option_string_actions]
    if strings and neutral in FLAGS:
        strings.append(f"--no-{strings[0][2:]}")
    if strings:
        parser.add_argument(*strings, action=_NotServed, dest="", neutral=neutral, instead=instead)
