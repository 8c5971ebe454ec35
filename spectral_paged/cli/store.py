"""`spectral-paged store`: what a folder of pages holds, if it is whole, and how to shrink it."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.file_limits import amount
from spectral_paged.options import parse_bytes

if TYPE_CHECKING:
    from spectral_paged.store import Entry, Folder


def add_store(parser: argparse.ArgumentParser) -> None:
    """Options of the command's actions."""
    actions = parser.add_subparsers(dest="action", required=True)
    ls = actions.add_parser("ls", help="show the records of each model and format")
    verify = actions.add_parser("verify", help="read every record and compare its checksum")
    verify.add_argument("--remove", action="store_true", help="remove those that are damaged")
    prune = actions.add_parser("prune", help="remove records, the least recently used first")
    prune.add_argument(
        "--size",
        type=parse_bytes,
        metavar="BYTES",
        help="bytes that may stay; default: all, and only what killed processes left is removed",
    )
    prune.add_argument(
        "--of",
        metavar="NAME",
        help="remove all records of a model and format, as `ls` names it; default: of none",
    )
    for action in (ls, verify, prune):
        action.add_argument("folder", type=Path, metavar="FOLDER", help="that of --kv-store")


def store(args: argparse.Namespace) -> int:
    """Run an action; 1 if records are damaged and stay."""
    from spectral_paged.store import Folder

    if not args.folder.is_dir():
        raise InvalidRequestError(f"there is no folder {shown(str(args.folder))}")
    folder = Folder(args.folder, None)
    if args.action == "ls":
        print(_table(folder))
        return 0
    if args.action == "verify":
        return _verify(folder, remove=args.remove)
    return _prune(folder, args.size, args.of)


def _table(folder: Folder) -> str:
    by_identity: dict[str, list[Entry]] = defaultdict(list)
    entries = folder.entries()
    for entry in entries:
        by_identity[entry.identity].append(entry)
    rows = []
    for name, found in sorted(by_identity.items()):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(e.used for e in found) / 1e9))
        size = amount(sum(e.num_bytes for e in found))
        rows.append(f"{name}  {len(found):>8} records {size:>12}  used {used}")
    total = amount(sum(e.num_bytes for e in entries))
    return "\n".join([*rows, f"{len(entries)} records in {folder.path}: {total}"])


def _verify(folder: Folder, *, remove: bool) -> int:
    from spectral_paged.store import BadRecordError, check_record

    entries, bad, left = folder.entries(), 0, 0
    for entry in entries:
        try:
            check_record(folder.path / entry.name)
        except FileNotFoundError:
            continue  # evicted meanwhile
        except (BadRecordError, OSError) as error:
            bad, left = bad + 1, left + 1
            told = f"{entry.name}: {error}"
            if remove:
                try:
                    folder.remove(entry.name)
                    left, told = left - 1, f"{told} (removed)"
                except OSError as cause:
                    told = f"{told} (it cannot be removed: {cause})"
            print(told, file=sys.stderr)
    print(f"{len(entries)} records in {folder.path}, {bad} damaged")
    return 1 if left else 0


def _prune(folder: Folder, size: int | None, name: str | None) -> int:
    before = folder.entries()
    if name is not None:
        chosen = [entry for entry in before if entry.identity == name]
        if not chosen:
            raise InvalidRequestError(
                f"nothing named {shown(name)} is in {folder.path}: `spectral-paged store ls` shows "
                "names"
            )
        for entry in chosen:
            folder.remove(entry.name)
    folder.shrink(sum(entry.num_bytes for entry in before) if size is None else size)
    after = folder.entries()
    left = amount(sum(entry.num_bytes for entry in after))
    print(f"removed {len(before) - len(after)} of {len(before)} records; {left} are left")
    return 0
