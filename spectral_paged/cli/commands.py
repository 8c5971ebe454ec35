"""The command line: `spectral-paged generate | serve | vllm-args | top | info | ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spectral_paged.cli.generate import add_generate, generate
from spectral_paged.cli.kept import add_cache, cache
from spectral_paged.cli.logs import FORMATS, LEVELS, logging_to_stderr
from spectral_paged.cli.prefill import add_prefill, prefill
from spectral_paged.cli.store import add_store, store
from spectral_paged.cli.vllm_args import add_vllm_args, vllm_args
from spectral_paged.cli.vllm_options import refuse_vllm_options
from spectral_paged.errors import InvalidRequestError, SpectralPagedError
from spectral_paged.file_limits import MAX_TEXT_BYTES, check_file
from spectral_paged.options import (
    CommandParser,
    LLMOptions,
    add_options,
    given_options,
    parse_bytes,
    positive,
    with_dashes,
)
from spectral_paged.server.command import METRICS_KEY_VARIABLE, add_serve, serve


class _Version(argparse.Action):
    """Prints the package's version from its metadata, which is read for this option alone."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('spectral-paged')}")
        parser.exit()


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="spectral-paged", description="Batched generation over spectral KV-cache pages."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True)
    generating = commands.add_parser("generate", help="complete the prompts of a JSONL file")
    add_generate(generating)
    prefilling = commands.add_parser(
        "prefill", help="compute the prompts of a JSONL file once, for later runs"
    )
    add_prefill(prefilling)
    serving = commands.add_parser("serve", help="answer OpenAI's HTTP requests")
    add_serve(serving)
    add_vllm_args(
        commands.add_parser("vllm-args", help="print the arguments of `vllm serve` for pages in it")
    )
    info = commands.add_parser("info", help="what a model needs and gets, by format")
    info.add_argument("model", help="alias, hub id, folder or .gguf file")
    info.add_argument(
        "--memory",
        type=parse_bytes,
        default=16 << 30,
        metavar="BYTES",
        help="memory of the cache whose capacity is printed",
    )
    add_options(info, LLMOptions, "trust_remote_code")
    _add_calibrate(
        commands.add_parser("calibrate", help="make the file that formats with a shared basis read")
    )
    top = commands.add_parser(
        "top", help="figures of a running `serve` or `generate --metrics-port`, live"
    )
    top.add_argument("url", help="such as http://localhost:9100")
    top.add_argument(
        "--interval",
        type=positive,
        default=1,
        metavar="SECONDS",
        help="seconds from one reading to the next",
    )
    top.add_argument(
        "--metrics-key",
        metavar="KEY",
        help=f"that of `serve`; default: that of ${METRICS_KEY_VARIABLE}, else none",
    )
    add_cache(commands.add_parser("cache", help="list or delete what is kept between runs"))
    add_store(commands.add_parser("store", help="show, check or shrink a folder of --kv-store"))
    bench = commands.add_parser("bench", help="measure; raw results are written as JSON")
    throughput = _add_bench(bench)["throughput"]
    for one in (generating, prefilling, serving, throughput):
        refuse_vllm_options(one)
    for one in commands.choices.values():
        group = one.add_argument_group("log, on stderr")
        group.add_argument(
            "--log-format", choices=FORMATS, default="text", help="key=value text or JSON lines"
        )
        level = "info" if one is serving else "warning"
        group.add_argument(
            "--log-level", choices=LEVELS, default=level, help="least level that is written"
        )
    return parser


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="alias, hub id, folder or .gguf file")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text files to calibrate on; default: the built-in text",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("spectral_basis.safetensors"),
        metavar="FILE",
        help="file to write, for --calibration",
    )
    add_options(parser, LLMOptions, "device", "dtype", "trust_remote_code")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=65536,
        metavar="TOKENS",
        help="stop after about so many tokens of text",
    )


def _add_bench(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    from spectral_paged.benchmarks import parsers

    return parsers.add_benches(parser)


def bench(args: argparse.Namespace) -> int:
    """Run a benchmark."""
    from spectral_paged.benchmarks import command

    return command.bench(args)


def top(args: argparse.Namespace) -> int:
    """Show the figures of another process's metrics endpoint."""
    from spectral_paged.metrics.top import watch

    key = args.metrics_key or os.environ.get(METRICS_KEY_VARIABLE) or None
    return watch(args.url, args.interval, key)


def info(args: argparse.Namespace) -> int:
    """Print a model's figures for every preset, read from its config without its weights."""
    from spectral_paged.cli.info import model_report
    from spectral_paged.models.geometry import ModelGeometry
    from spectral_paged.models.loader import load_config

    geometry = ModelGeometry.from_config(load_config(args.model, **given_options(args, LLMOptions)))
    print(model_report(args.model, geometry, args.memory))
    return 0


def calibrate(args: argparse.Namespace) -> int:
    """Run a model over text, write its calibration and print a summary."""
    from spectral_paged.device import choose_device, choose_dtype
    from spectral_paged.models import calibration
    from spectral_paged.models.loader import load_model

    missing = [str(f) for f in args.data or () if not f.is_file()]
    if missing:
        raise InvalidRequestError(f"there is no file {', '.join(missing)}: name text files")
    for file in args.data or ():
        check_file(file, MAX_TEXT_BYTES, "calibration text")
    if args.output.is_dir():
        raise InvalidRequestError(f"--output {str(args.output)!r} is a folder: name a file")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(args.output.parent, os.W_OK):
        raise InvalidRequestError(f"folder {str(args.output.parent)!r} cannot be written")
    files = args.data or ()
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    chosen = LLMOptions(**given_options(args, LLMOptions))
    device = choose_device(chosen.device)
    loaded = load_model(
        args.model,
        device=device,
        dtype=choose_dtype(chosen.dtype, device),
        trust_remote_code=chosen.trust_remote_code,
    )
    basis = calibration.calibrate(
        loaded,
        texts or [calibration.builtin_text()],
        max_spans=max(1, args.max_tokens // calibration.SPAN_TOKENS),
        progress=True,
    )
    basis.save(args.output)
    print(
        f"{args.output}: {basis.num_tokens} tokens, model {basis.model_fingerprint}, calibration "
        f"{basis.id}; use it with LLM(..., calibration={str(args.output)!r})"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    2: a typed error or an unusable file, whose message goes to stderr. 130: an interrupt.
    """
    args = build_parser().parse_args(with_dashes(sys.argv[1:] if argv is None else argv))
    commands = {
        "generate": generate,
        "prefill": prefill,
        "serve": serve,
        "vllm-args": vllm_args,
        "top": top,
        "info": info,
        "calibrate": calibrate,
        "cache": cache,
        "store": store,
        "bench": bench,
    }
    try:
        with logging_to_stderr(args.log_format, args.log_level):
            return commands[args.command](args)
    except KeyboardInterrupt:
        return 130
    except (SpectralPagedError, OSError) as error:
        print(f"spectral-paged: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
