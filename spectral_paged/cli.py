"""The command line: `spectral-paged generate | info | calibrate | bench`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from spectral_paged.errors import InvalidRequestError, SpectralPagedError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SAMPLING = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "n": int,
    "sampling_seed": int,
}


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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-paged", description="Batched generation over spectral KV-cache pages."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands.add_parser("generate", help="complete the prompts of a JSONL file"))
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
    bench = commands.add_parser("bench", help="measure; raw results are written as JSON")
    benches = bench.add_subparsers(dest="bench", required=True)
    _add_quality(benches.add_parser("quality", help="page formats and their peers on real text"))
    seal = benches.add_parser("seal", help="what sealing a block costs beside its prefill")
    seal.add_argument("--device", default="auto")
    seal.add_argument("--format", action="append", default=[], metavar="NAME", help="repeatable")
    seal.add_argument("--output-dir", type=Path, default=Path("benchmarks/results"))
    tune = benches.add_parser("tune", help="the kernels' launch table for this GPU")
    tune.add_argument("--output", type=Path, help="default the table that the package reads")
    _add_throughput(benches.add_parser("throughput", help="offline generation, end to end"))
    decode = benches.add_parser("decode", help="attention over pages against bf16 (needs a GPU)")
    decode.add_argument("--shape", action="append", default=[], help="repeatable; default all")
    decode.add_argument("--format", action="append", default=[], metavar="NAME", help="repeatable")
    decode.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"),
        help="where `bench quality` wrote: a format that was not judged has no row",
    )  # fmt: skip
    decode.add_argument("--unjudged", action="store_true", help="measure such formats all the same")
    decode.add_argument(
        "--report-only", action="store_true", help="the report of decode.json, with the KL of today"
    )
    decode.add_argument("--output-dir", type=Path, default=Path("benchmarks/results"))
    return parser


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--backend", action="append", default=[], metavar="NAME",
        help="a preset, exact, transformers, transformers-continuous; repeatable; default exact, "
        "auto and both of transformers",
    )  # fmt: skip
    parser.add_argument("--dataset", default="random", help="random, sharegpt, prefix_repetition")
    parser.add_argument("--dataset-path", type=Path, help="JSONL of sharegpt")
    parser.add_argument("--num-prompts", type=positive, default=64)
    parser.add_argument("--input-len", type=positive, default=1024)
    parser.add_argument(
        "--output-len", type=positive, help="default 128; of sharegpt, as long as the answer was"
    )
    parser.add_argument(
        "--random-range-ratio", type=float, default=0.0, help="lengths vary by this share"
    )
    parser.add_argument("--prefix-repetition-prefix-len", type=positive, default=512)
    parser.add_argument("--prefix-repetition-num-prefixes", type=positive, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--max-num-seqs", type=positive, action="append", default=[],
        help="requests at once; repeatable, a plot is drawn over them; default 256",
    )  # fmt: skip
    parser.add_argument("--max-num-batched-tokens", type=positive, default=8192)
    parser.add_argument("--kv-cache-memory", type=parse_bytes, metavar="BYTES")
    parser.add_argument("--no-enable-prefix-caching", action="store_true")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-model-len", type=positive)
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, no torch.compile")
    parser.add_argument(
        "--decode-only", action="store_true",
        help="fill contexts with made-up K and V: times the decode phase alone",
    )  # fmt: skip
    parser.add_argument(
        "--fit", action="store_true", help="of the prompts only as many as the cache holds at once"
    )
    parser.add_argument(
        "--suite", default="",
        help="a list of workloads with the model loaded once: 8b (random weights, one H200)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="of the suite; repeatable"
    )
    parser.add_argument("--name", default="", help="of the result's files; default the model's")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes; slower")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results"))


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--format", action="append", default=[], metavar="NAME",
        help="a preset, or exact; repeatable; default all presets",
    )  # fmt: skip
    parser.add_argument("--no-peers", action="store_true", help="our formats alone")
    parser.add_argument(
        "--sections", default="", metavar="NAME,...", help="default all, or those of --quick"
    )
    parser.add_argument("--quick", action="store_true", help="three sections, short and few texts")
    parser.add_argument(
        "--length", type=positive, action="append", default=[], help="context tokens; repeatable"
    )
    parser.add_argument("--windows", type=positive, help="windows of text a length; default 16")
    parser.add_argument("--needles", type=positive, help="needles exact must recall; default 64")
    parser.add_argument(
        "--text", action="append", default=[], metavar="[GENRE=]FILE", help="repeatable"
    )
    parser.add_argument("--calibration", default="auto", help="auto, or a file of `calibrate`")
    parser.add_argument(
        "--journal", type=Path, help="finished work; default build/quality/<model>.jsonl"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--time-limit", type=positive, metavar="SECONDS")
    parser.add_argument(
        "--report-only", action="store_true", help="judge nothing: report what the journal holds"
    )
    parser.add_argument(
        "--plot", type=Path, nargs="+", metavar="JSON",
        help="measure nothing: draw quality-pareto.png from results of several models",
    )  # fmt: skip


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="JSONL: prompts or batch lines")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--overwrite", action="store_true", help="forget an earlier output")
    parser.add_argument("--model", default="smollm2-135m")
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
    parser.add_argument("--seed", type=int, default=0, help="base seed of lines without one")
    parser.add_argument("--quiet", action="store_true")
    defaults = parser.add_argument_group("sampling, for lines that name no value")
    for name, kind in SAMPLING.items():
        defaults.add_argument("--" + name.replace("_", "-"), type=kind)


def generate(args: argparse.Namespace) -> int:
    """Run a batch file; 0 when every line got a record, bad lines included."""
    from spectral_paged.batch_file import OutputFile
    from spectral_paged.batch_run import BatchRun
    from spectral_paged.llm import LLM
    from spectral_paged.sampling import SamplingParams

    if not args.input.is_file():
        raise InvalidRequestError(f"there is no input file {str(args.input)!r}")
    defaults = {k: getattr(args, k) for k in SAMPLING if getattr(args, k) is not None}
    if "sampling_seed" in defaults:
        defaults["seed"] = defaults.pop("sampling_seed")
    SamplingParams(**defaults)  # a bad default would otherwise become the error of every line
    if args.output.exists() and args.output.samefile(args.input):
        raise InvalidRequestError(f"--input and --output are both {str(args.output)!r}")
    output = OutputFile(args.output, overwrite=args.overwrite)
    try:
        output.check(args.input)
        llm = LLM(
            args.model,
            kv_format=args.kv_format,
            device=args.device,
            dtype=args.dtype,
            kv_cache_bytes=args.kv_cache_bytes,
            gpu_memory_utilization=args.gpu_memory_utilization,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
            prefill_segment=args.prefill_segment,
            calibration=args.calibration,
            enable_prefix_caching=not args.no_prefix_caching,
            seed=args.seed,
        )
        begin = time.monotonic()
        summary = BatchRun(llm, args.input, output).run(defaults, quiet=args.quiet)
        seconds = time.monotonic() - begin
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
        stats = llm.stats()
        print(
            f"{summary.done} lines done, {summary.failed} with an error, {summary.skipped} "
            f"finished before; {summary.generated_tokens} tokens in {seconds:.1f} s "
            f"({summary.generated_tokens / max(seconds, 1e-9):.1f}/s)\n"
            f"backend {stats['backend']}, format {stats['format']}: {stats['pages_sealed']} pages "
            f"sealed, {stats['pages_attended']} page reads, ratio "
            f"{stats['compression_ratio']:.2f}x, {stats['prefix_hit_tokens']} prompt tokens from "
            f"the prefix cache, {stats['preemptions']} preemptions"
        )
    return 0


def info(args: argparse.Namespace) -> int:
    """Print a model's figures for every preset; needs its config, not its weights."""
    from spectral_paged.model_report import model_report
    from spectral_paged.models.geometry import ModelGeometry
    from spectral_paged.models.loader import load_config

    geometry = ModelGeometry.from_config(load_config(args.model))
    print(model_report(args.model, geometry, args.memory))
    return 0


def calibrate(args: argparse.Namespace) -> int:
    """Run a model over text and write its calibration; prints what it saw."""
    from spectral_paged import calibration
    from spectral_paged.models.loader import load_model
    from spectral_paged.placement import choose_device, choose_dtype

    missing = [str(f) for f in args.data or () if not f.is_file()]
    if missing:
        raise InvalidRequestError(f"there is no file {', '.join(missing)}: name text files")
    if args.output.is_dir():
        raise InvalidRequestError(f"--output {str(args.output)!r} is a folder: name a file")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(args.output.parent, os.W_OK):
        raise InvalidRequestError(f"folder {str(args.output.parent)!r} cannot be written")
    files = args.data or ()
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    device = choose_device(args.device)
    loaded = load_model(args.model, device=device, dtype=choose_dtype(args.dtype, device))
    basis = calibration.calibrate(
        loaded,
        texts or [calibration.builtin_text()],
        max_windows=max(1, args.max_tokens // calibration.WINDOW_TOKENS),
        progress=True,
    )
    basis.save(args.output)
    print(
        f"{args.output}: {basis.num_tokens} tokens, model {basis.model_fingerprint}, calibration "
        f"{basis.id}; use it with LLM(..., calibration={str(args.output)!r})"
    )
    return 0


def bench_decode(args: argparse.Namespace) -> int:
    """Run the decode benchmark; Triton is imported for it alone."""
    from spectral_paged.placement import choose_device

    if not args.report_only:
        choose_device("cuda")  # says what is missing
    from spectral_paged.benchmarks import decode

    return decode.main(
        output_dir=args.output_dir,
        results=args.results,
        shapes=args.shape,
        formats=args.format,
        unjudged=args.unjudged,
        report_only=args.report_only,
    )


def bench_tune(args: argparse.Namespace) -> int:
    """Time launches of kernels on this machine's GPU."""
    from spectral_paged.placement import choose_device

    choose_device("cuda")  # says what is missing
    from spectral_paged.benchmarks import tune

    return tune.main(output=args.output)


def bench_throughput(args: argparse.Namespace) -> int:
    """Generate, and say how fast."""
    from spectral_paged.benchmarks.throughput import run, suites, workload

    if args.suite:
        return suites.main(args.suite, only=args.only, output_dir=args.output_dir)
    return run.main(
        run.Options(
            model=args.model,
            workload=workload.WorkloadOptions(
                dataset=args.dataset,
                dataset_path=args.dataset_path,
                num_prompts=args.num_prompts,
                input_len=args.input_len,
                output_len=args.output_len,
                range_ratio=args.random_range_ratio,
                num_prefixes=args.prefix_repetition_num_prefixes,
                prefix_len=args.prefix_repetition_prefix_len,
                seed=args.seed,
            ),
            backends=args.backend or run.BACKENDS,
            device=args.device,
            dtype=args.dtype,
            max_num_seqs=args.max_num_seqs or (256,),
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_bytes=args.kv_cache_memory,
            enable_prefix_caching=not args.no_enable_prefix_caching,
            profile=args.profile,
            decode_only=args.decode_only,
            fit=args.fit,
            gpu_memory_utilization=args.gpu_memory_utilization,
            max_model_len=args.max_model_len,
            enforce_eager=args.enforce_eager,
            name=args.name,
            output_dir=args.output_dir,
        )
    )


def bench(args: argparse.Namespace) -> int:
    """Run a benchmark and print its table."""
    from spectral_paged.benchmarks import seal
    from spectral_paged.benchmarks.quality import run

    if args.bench == "seal":
        return seal.main(
            device=args.device, output_dir=args.output_dir, formats=tuple(args.format)
        )
    if args.bench == "decode":
        return bench_decode(args)
    if args.bench == "tune":
        return bench_tune(args)
    if args.bench == "throughput":
        return bench_throughput(args)
    if args.plot:
        return run.plot(args.plot, args.output_dir)
    return run.main(
        run.Options(
            model=args.model,
            device=args.device,
            dtype=args.dtype,
            formats=args.format,
            peers=not args.no_peers,
            sections=[s.strip() for s in args.sections.split(",") if s.strip()],
            quick=args.quick,
            lengths=sorted(set(args.length)),
            windows=args.windows,
            needles=args.needles,
            texts=args.text,
            calibration=args.calibration,
            journal=args.journal,
            output_dir=args.output_dir,
            time_limit=args.time_limit,
            report_only=args.report_only,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 for a typed error or an unusable file (the message goes to stderr), 130
    after an interrupt."""
    args = build_parser().parse_args(argv)
    try:
        return {"generate": generate, "info": info, "calibrate": calibrate, "bench": bench}[
            args.command
        ](args)
    except (SpectralPagedError, OSError) as error:
        print(f"spectral-paged: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
