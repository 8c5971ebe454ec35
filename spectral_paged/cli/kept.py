"""`spectral-paged cache`: what is kept between runs, and how to be rid of it."""

from __future__ import annotations

import argparse

from spectral_paged.errors import InvalidRequestError
from spectral_paged.file_limits import amount
from spectral_paged.models.kept_files import KeptFile, cache_folder, kept_files


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Options of the command; without an action it lists."""
    actions = parser.add_subparsers(dest="action")
    actions.add_parser("list", help="show each with its size and what it was made of; the default")
    clear = actions.add_parser("clear", help="delete; what is needed again is made again")
    clear.add_argument("names", nargs="*", metavar="NAME", help="as `list` shows it; default all")
    clear.add_argument(
        "--unused", action="store_true", help="only what earlier versions and killed runs left"
    )


def cache(args: argparse.Namespace) -> int:
    """List or delete conversions and calibrations."""
    found = kept_files()
    if args.action != "clear":
        print(_table(found))
        return 0
    names = {file.name for file in found}
    if wrong := [name for name in args.names if name not in names]:
        raise InvalidRequestError(
            f"nothing named {', '.join(wrong)} is kept in {cache_folder()}: "
            "`spectral-paged cache list` shows names"
        )
    chosen = [
        file
        for file in found
        if (file.name in args.names or not args.names) and not (args.unused and file.is_used)
    ]
    for file in chosen:
        file.delete()
    print(f"deleted {len(chosen)} of {len(found)}: {amount(sum(f.num_bytes for f in chosen))}")
    return 0


def _table(found: list[KeptFile]) -> str:
    rows = [
        f"{file.kind:11} {amount(file.num_bytes):>12}  {file.name}"
        + (f"  of {file.source}" if file.source else "")
        + ("" if file.is_used else "  (not used: of another version, or never finished)")
        for file in found
    ]
    total = amount(sum(file.num_bytes for file in found))
    return "\n".join([*rows, f"{len(found)} kept in {cache_folder()}: {total}"])
