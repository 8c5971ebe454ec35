"""The options of `spectral-paged bench throughput`."""

from __future__ import annotations

from pathlib import Path

from spectral_paged.benchmarks.common_options import (
    MODEL,
    Parser,
    add_llm_options,
    add_name,
    add_output_dir,
    add_repeatable,
)
from spectral_paged.options import DEFAULT_MODEL, num_tokens, positive

# options of an `LLM` that `bench throughput` hands on
SERVED = (
    "device",
    "dtype",
    "quantization",
    "max_num_batched_tokens",
    "kv_cache_bytes",
    "enable_prefix_caching",
    "gpu_memory_utilization",
    "max_model_len",
    "enforce_eager",
)


def add_throughput(parser: Parser) -> None:
    """Add the options of `bench throughput` to its parser."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL}, or random:<shape>")
    add_repeatable(
        parser,
        "--backend",
        metavar="NAME",
        help="a preset, exact, transformers, transformers-continuous, vllm[:KV-CACHE-DTYPE], or "
        "vllm-pages[:PRESET]; default: exact, auto and both of transformers, or the suite's",
    )
    parser.add_argument(
        "--dataset",
        "--dataset-name",
        default="random",
        help="random, sharegpt, or prefix_repetition",
    )
    parser.add_argument(
        "--dataset-path", type=Path, metavar="FILE", help="JSONL of sharegpt; default: none"
    )
    parser.add_argument(
        "--num-prompts", type=positive, default=64, metavar="N", help="number of requests"
    )
    add_repeatable(
        parser,
        "--input-len",
        "--random-input-len",
        type=num_tokens,
        metavar="TOKENS",
        help="tokens of a prompt; a plot is drawn over several; default: 1024",
    )
    parser.add_argument(
        "--output-len",
        "--random-output-len",
        type=num_tokens,
        metavar="TOKENS",
        help="tokens of a completion; default: 128; of sharegpt, as long as the answer was",
    )
    parser.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="lengths vary by this share",
    )
    parser.add_argument(
        "--prefix-repetition-prefix-len",
        type=num_tokens,
        default=512,
        metavar="TOKENS",
        help="tokens of a prefix of prefix_repetition",
    )
    parser.add_argument(
        "--prefix-repetition-num-prefixes",
        type=positive,
        default=4,
        metavar="N",
        help="number of prefixes of prefix_repetition",
    )
    add_llm_options(parser, "seed", help="seed of the requests that are made up")
    add_llm_options(
        parser,
        "max_num_seqs",
        action="append",
        default=[],
        help="requests at once; a plot is drawn over several; repeatable; default: 256",
    )
    add_llm_options(parser, *SERVED)
    parser.add_argument(
        "--decode-only",
        action="store_true",
        help="fill contexts with made-up K and V: times the decode phase alone",
    )
    parser.add_argument(
        "--fit", action="store_true", help="of the prompts only as many as the cache holds at once"
    )
    parser.add_argument(
        "--suite",
        default="",
        help="a list of workloads over one model of random weights, for one H200: 8b, 8b-4bit, "
        "or 8b-vllm beside vLLM; default: none",
    )
    add_repeatable(
        parser, "--only", metavar="NAME", help="workload of the suite; default: all of them"
    )
    add_name(parser)
    parser.add_argument("--profile", action="store_true", help="where a step's time goes; slower")
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: draw how fast --backend, one of them, is over each other of these "
        "results, by prompt length; default: measure",
    )
    parser.add_argument(
        "--append",
        action="store_true",
        help="keep the rows of other backends that the same workload left on this machine and "
        "commit, so that a table may be measured in several runs",
    )
    add_output_dir(parser)
