"""The command line: `spectral-paged generate | serve | top | info | calibrate | cache | bench`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_paged.arguments import (
    add_engine_options,
    engine_options,
    parse_bytes,
    port_number,
    positive,
)
from spectral_paged.cli.kept import add_cache, cache
from spectral_paged.cli.logs import FORMATS, LEVELS, logging_to_stderr
from spectral_paged.errors import InvalidRequestError, SpectralPagedError
from spectral_paged.file_limits import MAX_TEXT_BYTES, check_file
from spectral_paged.server.command import METRICS_KEY_VARIABLE, add_serve, serve

if TYPE_CHECKING:
    from spectral_paged.batch.file import OutputFile
    from spectral_paged.batch.run import BatchRun, BatchSummary
    from spectral_paged.llm import LLM

SAMPLING = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "n": int,
    "sampling_seed": int,
}


class _Version(argparse.Action):
    """Prints the package's version from its metadata, which is read for this option alone."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('spectral-paged')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-paged", description="Batched generation over spectral KV-cache pages."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands.add_parser("generate", help="complete the prompts of a JSONL file"))
    serving = commands.add_parser("serve", help="answer OpenAI's HTTP requests")
    add_serve(serving)
    info = commands.add_parser("info", help="what a model needs and gets, by format")
    info.add_argument("model", help="alias, hub id, folder or .gguf file")
    info.add_argument("--memory", type=parse_bytes, default=16 << 30, help="default 16GiB")
    calibrate = commands.add_parser(
        "calibrate", help="make the file that formats with a shared basis read"
    )
    calibrate.add_argument("model", help="alias, hub id, folder or .gguf file")
    calibrate.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="text files; default the built-in text"
    )
    calibrate.add_argument("--output", type=Path, default=Path("spectral_basis.safetensors"))
    calibrate.add_argument("--device", default="auto")
    calibrate.add_argument("--dtype", default="auto")
    calibrate.add_argument(
        "--max-tokens", type=positive, default=65536, help="stop after about so many; default 65536"
    )
    top = commands.add_parser(
        "top", help="figures of a running `serve` or `generate --metrics-port`, live"
    )
    top.add_argument("url", help="such as http://localhost:9100")
    top.add_argument("--interval", type=positive, default=1, help="seconds; default 1")
    top.add_argument(
        "--metrics-key", metavar="KEY", help=f"that of `serve`; or set {METRICS_KEY_VARIABLE}"
    )
    add_cache(commands.add_parser("cache", help="list or delete what is kept between runs"))
    bench = commands.add_parser("bench", help="measure; raw results are written as JSON")
    _add_bench(bench)
    for one in (info, calibrate):
        one.add_argument(
            "--trust-remote-code", action="store_true", help="run Python code of the model's own"
        )
    for one in commands.choices.values():
        group = one.add_argument_group("log, on stderr")
        group.add_argument("--log-format", choices=FORMATS, default="text")
        level = "info" if one is serving else "warning"
        group.add_argument("--log-level", choices=LEVELS, default=level)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=Path, required=True, help="JSONL or its .gz: prompts or lines"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--overwrite", action="store_true", help="forget an earlier output")
    parser.add_argument(
        "--resume-anyway",
        action="store_true",
        help="go on with an output that was begun with another model, format or sampling",
    )
    parser.add_argument("--model", default="smollm2-135m")
    add_engine_options(parser)
    watching = parser.add_argument_group("watching it run")
    shown = watching.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="no bar, no summary")
    shown.add_argument("--top", action="store_true", help="a live view instead of the bar")
    watching.add_argument(
        "--metrics-port", type=port_number, help="serve Prometheus metrics here while it runs"
    )
    watching.add_argument("--metrics-host", default="127.0.0.1", help="default 127.0.0.1")
    cluster = parser.add_argument_group("on a Ray cluster")
    cluster.add_argument("--ray", action="store_true", help="one worker for each GPU of a cluster")
    cluster.add_argument("--ray-workers", type=positive, help="how many; needed without GPUs")
    cluster.add_argument(
        "--ray-address", help="of the cluster; default RAY_ADDRESS, else this machine alone"
    )
    defaults = parser.add_argument_group("sampling, for lines that name no value")
    for name, kind in SAMPLING.items():
        defaults.add_argument("--" + name.replace("_", "-"), type=kind)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from spectral_paged.benchmarks import command

    command.add_benches(parser)


def bench(args: argparse.Namespace) -> int:
    """Run a benchmark."""
    from spectral_paged.benchmarks import command

    return command.bench(args)


def generate(args: argparse.Namespace) -> int:
    """Run a batch file; return 0 if every line got a record, bad ones too, but 1 if all are bad."""
    from spectral_paged.batch.file import OutputFile
    from spectral_paged.batch.source import check_source
    from spectral_paged.sampling import SamplingParams

    if not args.input.is_file():
        raise InvalidRequestError(f"there is no input file {str(args.input)!r}")
    if not args.ray and (args.ray_workers or args.ray_address):
        raise InvalidRequestError("--ray-workers and --ray-address need --ray")
    if args.ray and (args.top or args.metrics_port is not None):
        raise InvalidRequestError(
            "--top and --metrics-port show one engine; with --ray there are several: leave them out"
        )
    defaults = {k: getattr(args, k) for k in SAMPLING if getattr(args, k) is not None}
    if "sampling_seed" in defaults:
        defaults["seed"] = defaults.pop("sampling_seed")
    SamplingParams(**defaults)  # a bad default would otherwise become the error of every line
    if args.output.exists() and args.output.samefile(args.input):
        raise InvalidRequestError(f"--input and --output are both {str(args.output)!r}")
    output = OutputFile(args.output, overwrite=args.overwrite, run=_run_values(args, defaults))
    try:
        check_source(args.input)
        output.check(args.input)
        if not args.resume_anyway:
            output.check_run()
        serve_file = _generate_on_ray if args.ray else _generate_here
        summary, seconds, figures = serve_file(args, output, defaults)
    except KeyboardInterrupt:
        print(
            f"interrupted: finished lines are in {args.output}; the same command goes on from "
            "there",
            file=sys.stderr,
        )
        return 130
    finally:
        output.close()
    if not args.quiet:
        print(
            f"{summary.done} lines done, {summary.failed} with an error, {summary.skipped} "
            f"finished before; {summary.generated_tokens} tokens in {seconds:.1f} s "
            f"({summary.generated_tokens / max(seconds, 1e-9):.1f}/s){figures}"
        )
    if not output.num_served:
        print(
            f"spectral-paged: no line was served; the records in {args.output} say why",
            file=sys.stderr,
        )
        return 1
    return 0


def _run_values(args: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what changes every answer: the model, the format and the sampling defaults."""
    given = engine_options(args)
    names = ("dtype", "calibration", "prefill_segment", "seed", "generation_config")
    options = {"--" + name: given[name] for name in names if name in given}
    return {
        "model": args.model,
        "kv_format": given.get("kv_format", "auto"),
        **options,
        **{"sampling " + name: value for name, value in defaults.items()},
    }


def _generate_here(
    args: argparse.Namespace, output: OutputFile, defaults: dict[str, Any]
) -> tuple[BatchSummary, float, str]:
    """Serve the file with one LLM in this process; return the summary, seconds and figures."""
    from spectral_paged.batch.run import BatchRun
    from spectral_paged.llm import LLM

    show = args.top and _can_show()
    with _exporting(args) as export:
        llm = LLM(args.model, **engine_options(args))
        export(llm)
        begin = time.monotonic()
        run = BatchRun(llm, args.input, output)
        with _view(llm, run) if show else nullcontext():
            summary = run.run(defaults, quiet=args.quiet or show)
        seconds = time.monotonic() - begin
    stats = llm.stats()
    ran = (
        f"\nbackend {stats['backend']}, format {stats['format']}: {stats['pages_sealed']} pages "
        f"sealed, {stats['pages_attended']} page reads, ratio {stats['compression_ratio']:.2f}x, "
        f"{stats['prefix_hit_tokens']} prompt tokens from the prefix cache, "
        f"{stats['preemptions']} preemptions"
    )
    return summary, seconds, ran


def _generate_on_ray(
    args: argparse.Namespace, output: OutputFile, defaults: dict[str, Any]
) -> tuple[BatchSummary, float, str]:
    """Serve the file with workers of a Ray cluster; the seconds include loading."""
    from spectral_paged.integrations.ray import run_batch

    begin = time.monotonic()
    summary = run_batch(
        args.model,
        args.input,
        output,
        defaults,
        options=engine_options(args),
        num_workers=args.ray_workers,
        address=args.ray_address,
        quiet=args.quiet,
    )
    return summary, time.monotonic() - begin, ""


def _can_show() -> bool:
    """Return whether `--top` has a terminal, and print a note if it has none."""
    from spectral_paged.metrics import top

    if not top.can_show():
        print("--top: stdout is no terminal, so the plain bar is shown", file=sys.stderr)
        return False
    return True


def _view(llm: LLM, run: BatchRun) -> AbstractContextManager[None]:
    from spectral_paged.metrics import top

    return top.showing(llm, lambda: run.progress)


@contextmanager
def _exporting(args: argparse.Namespace) -> Iterator[Callable[[LLM], object]]:
    """Serve metrics inside if a port is given; yield the function that adds an LLM to them."""
    if args.metrics_port is None:
        yield lambda llm: None
        return
    from spectral_paged.metrics import serving

    with serving(args.metrics_port, args.metrics_host) as (collector, port):
        print(f"metrics at http://{args.metrics_host}:{port}/metrics", file=sys.stderr)
        yield collector.add


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

    geometry = ModelGeometry.from_config(
        load_config(args.model, trust_remote_code=args.trust_remote_code)
    )
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
    device = choose_device(args.device)
    loaded = load_model(
        args.model,
        device=device,
        dtype=choose_dtype(args.dtype, device),
        trust_remote_code=args.trust_remote_code,
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
    args = build_parser().parse_args(argv)
    commands = {
        "generate": generate,
        "serve": serve,
        "top": top,
        "info": info,
        "calibrate": calibrate,
        "cache": cache,
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
