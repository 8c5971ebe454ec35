"""Types and common options of command-line arguments."""

from __future__ import annotations

import argparse
import re
from typing import Any

from spectral_paged.errors import shown

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """Read `16GiB`, `512MiB`, `1.5G` or plain bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        value = int(float(match[1]) * UNITS[match[2].upper()])
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no amount of memory; write 16GiB, 512MiB or bytes"
        ) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no memory at all")
    return value


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


# Arguments of `LLM` as options of a command, with the keywords of `add_argument`.
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "--kv-format": {},
    "--device": {},
    "--dtype": {},
    "--kv-cache-bytes": {"type": parse_bytes},
    "--gpu-memory-utilization": {"type": float},
    "--max-num-seqs": {"type": positive},
    "--max-num-batched-tokens": {"type": positive},
    "--max-model-len": {"type": int},
    "--prefill-segment": {"type": int},
    "--calibration": {"help": "auto, or a file of `calibrate`"},
    "--no-prefix-caching": {"dest": "enable_prefix_caching", "action": "store_false"},
    "--seed": {"type": int, "help": "base seed of what names none"},
    "--generation-config": {
        "choices": ("auto", "none"),
        "help": "auto: the model's own sampling values where a request names none; default auto",
    },
    "--trust-remote-code": {"action": "store_true", "help": "run Python code of the model's own"},
}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add options of the cache and the engine to a command, which adds the model argument itself.

    The options have no defaults, so that `LLM` has the only ones.
    """
    for name, how in ENGINE_OPTIONS.items():
        parser.add_argument(name, default=argparse.SUPPRESS, **how)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `LLM` that were given, without the model, as plain values."""
    names = [how.get("dest", name[2:].replace("-", "_")) for name, how in ENGINE_OPTIONS.items()]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
