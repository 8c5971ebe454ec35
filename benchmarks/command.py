"""The arguments of `spectral-paged bench ...`, and the benchmarks that they run."""

from __future__ import annotations

import argparse
from pathlib import Path

from spectral_paged.arguments import parse_bytes, positive
from spectral_paged.errors import InvalidRequestError


def _add_output_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results"))


def _add_formats(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--format", action="append", default=[], metavar="NAME", help=help)


def add_benches(bench: argparse.ArgumentParser) -> None:
    """Add one subcommand a benchmark to the parser of `bench`."""
    benches = bench.add_subparsers(dest="bench", required=True)
    _add_quality(benches.add_parser("quality", help="page formats and their peers on real text"))
    seal = benches.add_parser("seal", help="what sealing a block costs beside its prefill")
    seal.add_argument("--device", default="auto")
    _add_formats(seal, "repeatable")
    _add_output_dir(seal)
    tune = benches.add_parser("tune", help="the kernels' launch table for this GPU")
    tune.add_argument("--output", type=Path, help="default the table that the package reads")
    room = benches.add_parser("capacity", help="how much context a memory holds, by format")
    room.add_argument("--model", default="smollm2-135m", help="also random:<shape>")
    room.add_argument("--device", default="auto")
    room.add_argument("--context", type=positive, default=8192, help="tokens of a sequence")
    room.add_argument("--kv-cache-bytes", type=parse_bytes, default=1 << 30, metavar="BYTES")
    room.add_argument("--max-num-seqs", type=positive, default=256)
    _add_formats(room, "repeatable")
    _add_output_dir(room)
    _add_throughput(benches.add_parser("throughput", help="offline generation, end to end"))
    _add_steps(benches.add_parser("steps", help="what a decode step is made of (needs a GPU)"))
    _add_unsloth(
        benches.add_parser("unsloth", help="generate or find needles, with it and without (a GPU)")
    )
    decode = benches.add_parser("decode", help="attention over pages against bf16 (needs a GPU)")
    decode.add_argument("--shape", action="append", default=[], help="repeatable; default all")
    _add_formats(decode, "repeatable")
    decode.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        help="where `bench quality` wrote: a format that was not judged has no row",
    )
    decode.add_argument("--unjudged", action="store_true", help="measure such formats all the same")
    decode.add_argument(
        "--report-only", action="store_true", help="the report of decode.json, with the KL of today"
    )
    _add_output_dir(decode)


def _add_unsloth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="a random:<shape>; default random:mistral-7b, with --needles smollm2-135m"
    )
    _add_formats(parser, "a preset, exact, or unpatched; repeatable")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--needles",
        type=positive,
        metavar="COUNT",
        help="ask a model with real weights for so many needles, times are not taken",
    )
    parser.add_argument(
        "--length",
        type=positive,
        action="append",
        default=[],
        help="context tokens of --needles; repeatable; default 2048",
    )
    parser.add_argument("--dtype", default="auto", help="of --needles")
    _add_output_dir(parser)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="random:llama-3-8b")
    _add_formats(parser, "a preset, or exact; repeatable; default exact and spectral-quality")
    parser.add_argument(
        "--layers",
        action="append",
        default=[],
        metavar="HOW",
        help="between the products: compiled, eager or liger, each in graphs; repeatable; "
        "default compiled",
    )
    parser.add_argument("--batch", type=positive, action="append", default=[], help="repeatable")
    parser.add_argument(
        "--context", type=positive, action="append", default=[], help="tokens; repeatable"
    )
    parser.add_argument("--kv-cache-bytes", type=parse_bytes, metavar="BYTES")
    parser.add_argument("--name", default="", help="of the result's file; default the model's")
    _add_output_dir(parser)


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="a preset, exact, transformers, transformers-continuous; repeatable; default exact, "
        "auto and both of transformers",
    )
    parser.add_argument("--dataset", default="random", help="random, sharegpt, prefix_repetition")
    parser.add_argument("--dataset-path", type=Path, help="JSONL of sharegpt")
    parser.add_argument("--num-prompts", type=positive, default=64)
    parser.add_argument(
        "--input-len",
        type=positive,
        action="append",
        default=[],
        help="repeatable, a plot is drawn over them; default 1024",
    )
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
        "--max-num-seqs",
        type=positive,
        action="append",
        default=[],
        help="requests at once; repeatable, a plot is drawn over them; default 256",
    )
    parser.add_argument("--max-num-batched-tokens", type=positive, default=8192)
    parser.add_argument("--kv-cache-bytes", type=parse_bytes, metavar="BYTES")
    parser.add_argument("--no-enable-prefix-caching", action="store_true")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-model-len", type=positive)
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, no torch.compile")
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
        help="a list of workloads with the model loaded once: 8b (random weights, one H200)",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="of the suite; repeatable"
    )
    parser.add_argument("--name", default="", help="of the result's files; default the model's")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes; slower")
    _add_output_dir(parser)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    _add_formats(parser, "a preset, or exact; repeatable; default all presets")
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
    _add_output_dir(parser)
    parser.add_argument("--time-limit", type=positive, metavar="SECONDS")
    parser.add_argument(
        "--report-only", action="store_true", help="judge nothing: report what the journal holds"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: draw quality-pareto.png from results of several models",
    )


def bench_decode(args: argparse.Namespace) -> int:
    """Run the decode benchmark, which imports Triton."""
    from spectral_paged.device import choose_device

    if not args.report_only:
        choose_device("cuda")  # refuses with a remedy if there is no GPU
    from spectral_paged.benchmarks.decode import run as decode

    return decode.main(
        output_dir=args.output_dir,
        results=args.results,
        shapes=args.shape,
        formats=args.format,
        unjudged=args.unjudged,
        report_only=args.report_only,
    )


def bench_tune(args: argparse.Namespace) -> int:
    """Find the kernels' fastest launches on this machine's GPU."""
    from spectral_paged.device import choose_device

    choose_device("cuda")  # refuses with a remedy if there is no GPU
    from spectral_paged.benchmarks.decode import tune

    return tune.main(output=args.output)


def bench_unsloth(args: argparse.Namespace) -> int:
    """Time Unsloth's generation with and without the patch, or ask its model for needles.

    Raises:
        InvalidRequestError: an option of `--needles` is given without it.
    """
    from spectral_paged.benchmarks.unsloth import run as unsloth
    from spectral_paged.device import choose_device

    choose_device("cuda")  # refuses with a remedy if there is no GPU
    arguments = {"enforce_eager": args.enforce_eager, "output_dir": args.output_dir}
    package = "spectral_paged.benchmarks"
    if args.needles:
        arguments |= {
            "model": "smollm2-135m" if args.model is None else args.model,
            "formats": args.format or ["exact", "spectral-quality"],
            "count": args.needles,
            "lengths": args.length or [2048],
            "dtype": args.dtype,
        }
        return unsloth.run_apart(f"{package}.unsloth.needles", arguments)
    if args.length or args.dtype != "auto":
        raise InvalidRequestError("--length and --dtype are of --needles: give it too")
    arguments |= {
        "model": "random:mistral-7b" if args.model is None else args.model,
        "formats": args.format,
    }
    return unsloth.run_apart(f"{package}.unsloth.run", arguments)


def bench_steps(args: argparse.Namespace) -> int:
    """Time decode steps and report where their time goes."""
    from spectral_paged.device import choose_device

    choose_device("cuda")  # refuses with a remedy if there is no GPU
    from spectral_paged.benchmarks import steps

    return steps.main(
        model=args.model,
        formats=args.format or steps.FORMATS,
        layers=args.layers or steps.LAYERS[:1],
        batches=args.batch or (1, 128),
        contexts=args.context or (128,),
        name=args.name,
        output_dir=args.output_dir,
        kv_cache_bytes=args.kv_cache_bytes,
    )


def bench_capacity(args: argparse.Namespace) -> int:
    """Fill caches of one size with contexts, by format."""
    from spectral_paged.benchmarks import capacity

    return capacity.main(
        model=args.model,
        device=args.device,
        context=args.context,
        memory=args.kv_cache_bytes,
        max_num_seqs=args.max_num_seqs,
        formats=tuple(args.format),
        output_dir=args.output_dir,
    )


def bench_throughput(args: argparse.Namespace) -> int:
    """Generate offline and report the throughput."""
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
                input_len=(args.input_len or [1024])[0],
                output_len=args.output_len,
                range_ratio=args.random_range_ratio,
                num_prefixes=args.prefix_repetition_num_prefixes,
                prefix_len=args.prefix_repetition_prefix_len,
                seed=args.seed,
            ),
            backends=args.backend or run.BACKENDS,
            device=args.device,
            dtype=args.dtype,
            input_lens=args.input_len,
            max_num_seqs=args.max_num_seqs or (256,),
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_bytes=args.kv_cache_bytes,
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
        return seal.main(device=args.device, output_dir=args.output_dir, formats=tuple(args.format))
    if args.bench == "decode":
        return bench_decode(args)
    if args.bench == "tune":
        return bench_tune(args)
    if args.bench == "unsloth":
        return bench_unsloth(args)
    if args.bench == "steps":
        return bench_steps(args)
    if args.bench == "capacity":
        return bench_capacity(args)
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
