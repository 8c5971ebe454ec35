"""`spectral-paged generate` completes the lines of a file, here or on a Ray cluster."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_paged.cli.input_file import add_input, check_input
from spectral_paged.errors import InvalidRequestError
from spectral_paged.options import (
    DEFAULT_MODEL,
    LLMOptions,
    add_options,
    given_options,
    port_number,
    positive,
)

if TYPE_CHECKING:
    from spectral_paged.batch.file import OutputFile
    from spectral_paged.batch.run import BatchRun, BatchSummary
    from spectral_paged.llm import LLM

BY_MODEL = "default: as the model's generation config has it, else"
# field of `SamplingParams`: type, help
SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, f"most tokens of a completion; {BY_MODEL} 16"),
    "temperature": (float, f"0 takes the most probable token; {BY_MODEL} 1"),
    "top_p": (
        float,
        f"draw from the smallest set of tokens that is so probable; {BY_MODEL} 1",
    ),
    "top_k": (int, f"draw from so many most probable tokens, 0 for all; {BY_MODEL} 0"),
    "min_p": (float, f"drop tokens below this share of the highest probability; {BY_MODEL} 0"),
    "n": (int, "completions of a prompt; default: 1"),
    "seed": (int, "seed of a line's draws; default: made of --seed and the line's number"),
}


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_input(parser, "JSONL, a request a line: prompts, messages or OpenAI's batch lines")
    parser.add_argument(
        "--output",
        "--output-file",
        "-o",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL, a record a line; finished lines of an earlier run stay",
    )
    parser.add_argument("--overwrite", action="store_true", help="forget an earlier output")
    parser.add_argument(
        "--resume-anyway",
        action="store_true",
        help="go on with an output that was begun with another model, format or sampling",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="alias, hub id, folder or .gguf file"
    )
    add_options(parser, LLMOptions)
    watching = parser.add_argument_group("watching it run")
    shown = watching.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="no bar, no summary")
    shown.add_argument("--top", action="store_true", help="a live view instead of the bar")
    watching.add_argument(
        "--metrics-port",
        type=port_number,
        metavar="PORT",
        help="serve Prometheus metrics at this port while it runs; default: nowhere",
    )
    watching.add_argument(
        "--metrics-host", default="127.0.0.1", metavar="HOST", help="where --metrics-port listens"
    )
    cluster = parser.add_argument_group("on a Ray cluster")
    cluster.add_argument("--ray", action="store_true", help="one worker for each GPU of a cluster")
    cluster.add_argument(
        "--ray-workers",
        type=positive,
        metavar="N",
        help="number of workers, needed without GPUs; default: one for each GPU",
    )
    cluster.add_argument(
        "--ray-address", help="of the cluster; default: $RAY_ADDRESS, else this machine alone"
    )
    defaults = parser.add_argument_group("sampling, for lines that name no value")
    for name, (kind, text) in SAMPLING.items():
        option = "sampling-seed" if name == "seed" else name.replace("_", "-")
        how: dict[str, Any] = {"type": kind, "metavar": name.upper(), "help": text}
        defaults.add_argument(f"--{option}", dest=f"sampling_{name}", **how)


def generate(args: argparse.Namespace) -> int:
    """Run a batch file; return 0 if every line got a record, bad ones too, but 1 if all are bad."""
    check_input(args.input)
    if not args.ray and (args.ray_workers or args.ray_address):
        raise InvalidRequestError("--ray-workers and --ray-address need --ray")
    if args.ray and (args.top or args.metrics_port is not None):
        raise InvalidRequestError(
            "--top and --metrics-port show one engine; with --ray there are several: leave them out"
        )
    from spectral_paged.batch.file import OutputFile
    from spectral_paged.batch.source import check_source
    from spectral_paged.sampling import SamplingParams

    given = {name: getattr(args, f"sampling_{name}") for name in SAMPLING}
    defaults = {name: value for name, value in given.items() if value is not None}
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
    given = given_options(args, LLMOptions)
    names = [
        "dtype",
        "quantization",
        "calibration",
        "prefill_segment",
        "exempt_layers",
        "seed",
        "generation_config",
        "allow_special_tokens",
        "lora_modules",
    ]
    options = {"--" + name.replace("_", "-"): given[name] for name in names if name in given}
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
    from transformers.utils.logging import disable_progress_bar

    from spectral_paged.batch.run import BatchRun
    from spectral_paged.llm import LLM
    from spectral_paged.outputs import ratio_text

    show = args.top and _can_show()
    if args.quiet or show:
        disable_progress_bar()  # of the weights
    with _exporting(args) as export:
        llm = LLM(args.model, **given_options(args, LLMOptions))
        export(llm)
        begin = time.monotonic()
        run = BatchRun(llm, args.input, output)
        with _view(llm, run) if show else nullcontext():
            summary = run.run(defaults, quiet=args.quiet or show)
        seconds = time.monotonic() - begin
    stats: dict[str, Any] = llm.stats()
    ran = (
        f"\nbackend {stats['backend']}, format {stats['format']}: {stats['pages_sealed']} pages "
        f"sealed, {stats['pages_attended']} page reads, ratio "
        f"{ratio_text(stats['compression_ratio'])}, {stats['prefix_hit_tokens']} prompt tokens "
        f"from the prefix cache, {stats['preemptions']} preemptions"
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
        options=given_options(args, LLMOptions),
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
