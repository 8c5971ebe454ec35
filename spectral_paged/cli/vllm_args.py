"""`spectral-paged vllm-args`: the arguments of `vllm serve` that bring pages in."""

from __future__ import annotations

import argparse

from spectral_paged.errors import InvalidRequestError
from spectral_paged.options import LLMOptions, add_options, given_options

FIELDS = (
    "kv_format",
    "calibration",
    "prefill_segment",
    "exempt_layers",
    "max_num_seqs",
    "kv_host_memory",
    "kv_store",
    "kv_store_size",
)


def add_vllm_args(parser: argparse.ArgumentParser) -> None:
    """Options of the command; every other option is vLLM's own and follows the substitution."""
    parser.add_argument("model", help="model as vLLM takes it: a hub id or a folder")
    add_options(parser, LLMOptions, *FIELDS)


def vllm_args(args: argparse.Namespace) -> int:
    """Print the arguments on one line, for `vllm serve $(spectral-paged vllm-args MODEL)`.

    Raises:
        InvalidRequestError: an argument has a space, at which a shell would cut it.
    """
    from spectral_paged.integrations.vllm import serve_flags

    flags = serve_flags(args.model, **given_options(args, LLMOptions))
    if cut := [flag for flag in flags if flag.split() != [flag]]:
        raise InvalidRequestError(
            f"{cut[0]!r} has a space, at which a shell would cut it: use a path without one"
        )
    print(*flags)
    return 0
