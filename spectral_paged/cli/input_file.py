"""The input file of commands that read JSONL: its option, and the check that it is a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from spectral_paged.errors import InvalidRequestError


def add_input(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--input`, under vLLM's names too."""
    parser.add_argument(
        "--input", "--input-file", "-i", type=Path, required=True, metavar="FILE", help=help
    )


def check_input(path: Path) -> None:
    """Refuse an input that is not there.

    Raises:
        InvalidRequestError: no such file, or a folder.
    """
    if not path.is_file():
        folder = ": it is a folder, name a file in it" if path.is_dir() else ""
        raise InvalidRequestError(f"there is no input file {str(path)!r}{folder}")
