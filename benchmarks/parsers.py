"""The options of `spectral-paged bench ...`, one parser a benchmark."""

from __future__ import annotations

from pathlib import Path

from spectral_paged.benchmarks.common_options import (
    ARENAS,
    MODEL,
    Parser,
    add_formats,
    add_llm_options,
    add_name,
    add_output_dir,
    add_repeatable,
)
from spectral_paged.benchmarks.throughput.options import add_throughput
from spectral_paged.options import DEFAULT_MODEL, num_tokens, positive

DRAFTS = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2}'


def add_benches(bench: Parser) -> dict[str, Parser]:
    """Add one subcommand a benchmark to the parser of `bench`; return their parsers by name."""
    benches = bench.add_subparsers(dest="bench", required=True)
    _add_quality(benches.add_parser("quality", help="page formats and their peers on real text"))
    seal = benches.add_parser("seal", help="what sealing a block costs beside its prefill")
    add_llm_options(seal, "device")
    add_formats(seal)
    add_output_dir(seal)
    tune = benches.add_parser("tune", help="the kernels' launch table for this GPU")
    tune.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="table to write; default: the one that the package reads",
    )
    _add_capacity(benches.add_parser("capacity", help="how much context a memory holds, by format"))
    add_throughput(benches.add_parser("throughput", help="offline generation, end to end"))
    _add_served(benches.add_parser("served", help="needles and divergence through whole engines"))
    _add_store(benches.add_parser("store", help="prompts that come back from host memory and disk"))
    _add_steps(benches.add_parser("steps", help="what a decode step is made of (needs a GPU)"))
    _add_host(benches.add_parser("host", help="what a decode step costs the host, without a model"))
    _add_prompts(benches.add_parser("prompts", help="how fast prompts are computed, and by what"))
    _add_speculation(
        benches.add_parser("speculation", help="decoding with drafts by n-gram look-up, or without")
    )
    _add_unsloth(
        benches.add_parser("unsloth", help="generate or find needles, with it and without (a GPU)")
    )
    _add_decode(
        benches.add_parser("decode", help="attention over pages against bf16 (needs a GPU)")
    )
    return dict(benches.choices)


def _add_capacity(parser: Parser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL}, or random:<shape>")
    add_llm_options(parser, "device", "max_num_seqs")
    add_llm_options(parser, "kv_cache_bytes", default=1 << 30, help=ARENAS)
    parser.add_argument(
        "--context", type=num_tokens, default=8192, metavar="TOKENS", help="tokens of a sequence"
    )
    add_formats(parser)
    add_output_dir(parser)


def _add_served(parser: Parser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=MODEL)
    add_repeatable(
        parser,
        "--backend",
        metavar="NAME",
        help="a preset, exact, vllm[:KV-CACHE-DTYPE], or vllm-pages[:PRESET]; the others are "
        "compared with the first; default: exact and auto",
    )
    add_repeatable(
        parser,
        "--length",
        type=num_tokens,
        metavar="TOKENS",
        help="context tokens; default: 2048",
    )
    for name, default, what in (
        ("--needles", 32, "facts asked for at each length"),
        ("--windows", 8, "contexts of real text at each length"),
        ("--places", 16, "next tokens judged after each of them"),
    ):
        parser.add_argument(name, type=positive, default=default, metavar="N", help=what)
    add_llm_options(parser, "device", "dtype", "gpu_memory_utilization")
    add_llm_options(parser, "kv_cache_bytes")
    add_llm_options(parser, "max_num_seqs", default=16)
    add_name(parser)
    add_output_dir(parser)


def _add_store(parser: Parser) -> None:
    parser.add_argument(
        "--suite", default="8b", help="8b, for one H200, or tiny, for a CPU; default: 8b"
    )
    add_repeatable(
        parser,
        "--only",
        metavar="NAME",
        help="ttft, turns, documents, nohit, or vllm (turns, in vLLM); default: all but vllm",
    )
    add_llm_options(parser, "kv_format", "device", "dtype")
    add_llm_options(
        parser,
        "kv_store",
        help="a folder on the disk to measure; default: where temporary files are",
    )
    parser.add_argument(
        "--conversations", type=positive, metavar="N", help="of turns; default: the suite's"
    )
    add_output_dir(parser)


def _add_decode(parser: Parser) -> None:
    add_repeatable(parser, "--shape", help="shape of a model's heads; default: all")
    add_formats(parser, "a preset; default: all")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="where `bench quality` wrote: a format that was not judged has no row",
    )
    parser.add_argument("--unjudged", action="store_true", help="measure such formats all the same")
    parser.add_argument(
        "--report-only", action="store_true", help="the report of decode.json, with the KL of today"
    )
    parser.add_argument(
        "--shared",
        type=positive,
        metavar="N",
        help="N questions on one document of 32,768 tokens against N documents; default: none",
    )
    add_output_dir(parser)


def _add_unsloth(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        help=f"a random:<shape>; default: random:mistral-7b, with --needles {DEFAULT_MODEL}",
    )
    add_formats(parser, "a preset, exact, or unpatched; default: those that are compared")
    add_llm_options(parser, "enforce_eager")
    parser.add_argument(
        "--needles",
        type=positive,
        metavar="COUNT",
        help="ask a model with real weights for so many needles; default: none, times are taken",
    )
    add_repeatable(
        parser,
        "--length",
        type=num_tokens,
        metavar="TOKENS",
        help="context tokens of --needles; default: 2048",
    )
    add_llm_options(parser, "dtype", help="dtype of the model of --needles, as in `serve`")
    add_output_dir(parser)


def _add_steps(parser: Parser) -> None:
    parser.add_argument("--model", default="random:llama-3-8b", help=f"{MODEL}, or random:<shape>")
    add_formats(parser, "a preset, or exact; default: exact and spectral-quality")
    add_repeatable(
        parser,
        "--layers",
        metavar="HOW",
        help="between the products: compiled, eager or liger, each in graphs; default: compiled",
    )
    add_repeatable(
        parser, "--batch", type=positive, metavar="N", help="sequences at once; default: 1, 128"
    )
    add_repeatable(
        parser,
        "--context",
        type=num_tokens,
        metavar="TOKENS",
        help="tokens of a sequence; default: 128",
    )
    add_llm_options(parser, "kv_cache_bytes")
    add_name(parser)
    add_output_dir(parser)


def _add_host(parser: Parser) -> None:
    add_llm_options(parser, "device")
    add_formats(parser, "a preset, or exact; default: exact and spectral-quality")
    add_repeatable(
        parser, "--batch", type=positive, metavar="N", help="sequences at once; default: 1, 64, 256"
    )
    add_name(parser)
    add_output_dir(parser)


def _add_speculation(parser: Parser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL}, with weights")
    add_llm_options(parser, "kv_format", default="spectral-quality")
    add_llm_options(parser, "device", "dtype", "kv_cache_bytes")
    add_repeatable(
        parser, "--task", metavar="NAME", help="quote, edit, summary or story; default: all"
    )
    add_repeatable(
        parser, "--batch", type=positive, metavar="N", help="sequences at once; default: 1, 8"
    )
    parser.add_argument(
        "--output-len", type=num_tokens, default=256, metavar="TOKENS", help="tokens of an output"
    )
    add_llm_options(parser, "speculative_config", default=DRAFTS, help="as of `serve`")
    add_name(parser)
    add_output_dir(parser)


def _add_prompts(parser: Parser) -> None:
    parser.add_argument("--model", default="random:llama-3-8b", help=f"{MODEL}, or random:<shape>")
    add_llm_options(parser, "device", "dtype", "enforce_eager")
    many = {"type": num_tokens, "metavar": "TOKENS"}
    add_repeatable(
        parser, "--keys", help="keys of a chunk alone; default: 2048, 8192, 32768, 131072", **many
    )
    add_repeatable(
        parser, "--queries", help="queries at their end; default: 2048 and 8192, and all", **many
    )
    parser.add_argument(
        "--attention-only", action="store_true", help="time chunks alone, without the engine"
    )
    add_formats(parser, "a preset, or exact; default: exact and spectral-quality")
    add_repeatable(
        parser,
        "--prefill-segment",
        type=int,
        metavar="TOKENS",
        help="prompt tokens that stay exact until their segment ends; default: 2048",
    )
    add_repeatable(
        parser, "--input-len", help="tokens of a prompt; default: 8192 and 32768", **many
    )
    add_repeatable(
        parser,
        "--max-num-batched-tokens",
        help="tokens of a step; default: 2048, 8192 and 16384",
        **many,
    )
    parser.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help="prompts of a length; default: as many as make 65,536 tokens, at least 2",
    )
    add_name(parser)
    add_output_dir(parser)


def _add_quality(parser: Parser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=MODEL)
    add_llm_options(parser, "device", "dtype", "calibration")
    add_formats(parser, "a preset, or exact; default: all presets")
    add_repeatable(
        parser,
        "--variant",
        metavar="TEXT",
        help='one more format: a preset and its changes, as "spectral-quality k=16x8+48x2 v=64x3"',
    )
    parser.add_argument("--no-peers", action="store_true", help="our formats alone")
    parser.add_argument(
        "--sections",
        default="",
        metavar="NAME,...",
        help="parts of the report; default: all, or those of --quick",
    )
    parser.add_argument("--quick", action="store_true", help="three sections, short and few texts")
    add_repeatable(
        parser,
        "--length",
        type=num_tokens,
        metavar="TOKENS",
        help="context tokens; default: those that fit the model",
    )
    parser.add_argument(
        "--windows",
        type=positive,
        metavar="N",
        help="windows of text a length; default: 16, with --quick 4",
    )
    parser.add_argument(
        "--needles",
        type=positive,
        metavar="N",
        help="needles that exact must recall; default: 64, with --quick 16",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="tasks of each of RULER's kinds a length; default: 8, with --quick 1",
    )
    add_repeatable(
        parser, "--text", metavar="[GENRE=]FILE", help="text to judge by; default: the built-in one"
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="finished work; default: build/quality/<model>.jsonl",
    )
    add_output_dir(parser)
    parser.add_argument(
        "--time-limit", type=positive, metavar="SECONDS", help="stop after it; default: none"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="judge nothing: report what the journal holds"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: draw quality-pareto.png from results of several models; default: "
        "measure",
    )
