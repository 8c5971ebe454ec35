"""Types and common options of command-line arguments."""

from __future__ import annotations

import argparse
import re
from typing import Any

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


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of the cache and the engine; a command adds the model's own way."""
    parser.add_argument("--kv-format", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-bytes", type=parse_bytes)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-num-seqs", type=positive, default=256)
    parser.add_argument("--max-num-batched-tokens", type=positive, default=8192)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--prefill-segment", type=int, default=2048)
    parser.add_argument("--calibration", default="auto", help="auto, or a file of `calibrate`")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="base seed of what names none")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code of the model's own"
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM` besides the model, plain values all."""
    return {
        "kv_format": args.kv_format,
        "device": args.device,
        "dtype": args.dtype,
        "kv_cache_bytes": args.kv_cache_bytes,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_model_len": args.max_model_len,
        "prefill_segment": args.prefill_segment,
        "calibration": args.calibration,
        "enable_prefix_caching": not args.no_prefix_caching,
        "trust_remote_code": args.trust_remote_code,
        "seed": args.seed,
    }
