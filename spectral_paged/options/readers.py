"""Readers of the values of options: each makes a value of a text, or says what to write."""

from __future__ import annotations

import argparse
import re
from fractions import Fraction

from spectral_paged.errors import InvalidRequestError, shown

_AMOUNT = re.compile(r"\s*([0-9.]+)\s*([KMGT]?)(i?B)?\s*", re.IGNORECASE)


def _amount(text: str, *, is_bytes: bool) -> Fraction:
    """Read a number with a unit: a small letter alone is a power of 1000, any other of 1024."""
    match = _AMOUNT.fullmatch(text)
    if match is None or (match[3] and not is_bytes):
        raise ValueError
    base = 1024 if match[3] or match[2].isupper() else 1000
    return Fraction(match[1]) * base ** " KMGT".index(match[2].upper() or " ")


def parse_bytes(text: str) -> int:
    """Read `16GiB`, `512MiB`, `1.5G` or plain bytes.

    Units are powers of 1024. A small letter alone is a power of 1000, as in vLLM: `16g`.
    """
    try:
        value = int(_amount(text, is_bytes=True))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no amount of memory; write 16GiB, 512MiB or bytes"
        ) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no memory at all")
    return value


def bytes_of(name: str, text: str) -> int:
    """Read a text as `parse_bytes` does, where it is the option `name` of a Python call.

    Raises:
        InvalidRequestError: it is no amount of memory.
    """
    try:
        return parse_bytes(text)
    except argparse.ArgumentTypeError as error:
        raise InvalidRequestError(f"{name}: {error}") from error


def num_tokens(text: str) -> int:
    """Read a number of tokens: `32768`, or as in vLLM `32K` (32,768) and `32k` (32,000)."""
    try:
        value = _amount(text, is_bytes=False)
    except ValueError:
        value = Fraction(0)
    if value < 1 or value.denominator != 1:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no number of tokens: write a whole number of at least 1, such as "
            "32768, 32K (32,768) or 32k (32,000)"
        )
    return int(value)


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be an integer of at least 1")
    return value


def port_number(text: str) -> int:
    """Read a TCP port, 0 to 65535; 0 stands for any free port."""
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no port: write a number up to 65535")
    return int(text)
