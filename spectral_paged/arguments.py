"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import re

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """`16GiB`, `512MiB`, `1.5G` or plain bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        value = int(float(match[1]) * UNITS[match[2].upper()])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no amount of memory; write 16GiB, 512MiB or bytes"
        ) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory at all")
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return value


def port_number(text: str) -> int:
    """A TCP port, 0 to 65535; 0 asks for any that is free."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: write a number up to 65535")
    return int(text)
