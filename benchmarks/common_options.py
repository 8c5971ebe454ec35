"""Options that several benchmarks have, and how they are added to a parser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_paged.options import LLMOptions, add_options

MODEL = "alias, hub id, folder or .gguf file"
ARENAS = "bytes of all pages together, allocated once"

Parser = argparse.ArgumentParser


def add_output_dir(parser: Parser) -> None:
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="where results are written",
    )


def add_repeatable(parser: Parser, *names: str, help: str, **how: Any) -> None:
    parser.add_argument(*names, action="append", default=[], help=f"{help}; repeatable", **how)


def add_formats(parser: Parser, help: str = "a preset, or exact; default: all") -> None:
    add_repeatable(parser, "--format", "--kv-format", metavar="NAME", help=help)


def add_llm_options(parser: Parser, *names: str, **how: Any) -> None:
    """Add options of an `LLM`, with its defaults where the benchmark has none of its own."""
    for name in names:
        add_options(parser, LLMOptions, name, **{"default": getattr(LLMOptions, name)} | how)


def add_name(parser: Parser) -> None:
    parser.add_argument(
        "--name", default="", help="of the result's files; default: made of the model's"
    )
