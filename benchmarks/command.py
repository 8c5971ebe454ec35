"""`spectral-paged bench` runs the benchmark that its options name."""

from __future__ import annotations

import argparse
from pathlib import Path

from spectral_paged.benchmarks.throughput.options import SERVED
from spectral_paged.errors import InvalidRequestError
from spectral_paged.options import DEFAULT_MODEL, LLMOptions


def bench_decode(args: argparse.Namespace) -> int:
    """Run the decode benchmark, which imports Triton."""
    from spectral_paged.device import choose_device

    if not args.report_only:
        choose_device("cuda")  # refuses with a remedy if there is no GPU
    from spectral_paged.benchmarks.decode import run as decode, shared

    if args.shared is not None:
        return shared.main(
            sharers=args.shared, output_dir=args.output_dir, shapes=args.shape, formats=args.format
        )
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
            "model": DEFAULT_MODEL if args.model is None else args.model,
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


def bench_host(args: argparse.Namespace) -> int:
    """Time what decode steps cost the host, without a model."""
    from spectral_paged.benchmarks import host

    return host.main(
        formats=args.format or host.FORMATS,
        batches=args.batch or host.BATCHES,
        device=args.device,
        name=args.name,
        output_dir=args.output_dir,
    )


def bench_speculation(args: argparse.Namespace) -> int:
    """Time decoding with drafts by n-gram look-up, and without."""
    from spectral_paged.benchmarks import speculation

    if unknown := [task for task in args.task if task not in speculation.PROMPTS]:
        raise InvalidRequestError(
            f"--task {unknown[0]} is unknown; there are {', '.join(speculation.PROMPTS)}"
        )
    return speculation.main(
        model=args.model,
        kv_format=args.kv_format,
        device=args.device,
        dtype=args.dtype,
        tasks=args.task or list(speculation.PROMPTS),
        batches=args.batch or speculation.BATCHES,
        num_tokens=args.output_len,
        speculative_config=args.speculative_config,
        kv_cache_bytes=args.kv_cache_bytes,
        name=args.name,
        output_dir=args.output_dir,
    )


def bench_prompts(args: argparse.Namespace) -> int:
    """Time attention of prompt chunks by every backend, and prompts in the engine."""
    from spectral_paged.benchmarks.prompts import attention, engine, run

    return run.main(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        keys=args.keys or attention.KEYS,
        queries=args.queries or attention.QUERIES,
        formats=args.format or engine.FORMATS,
        segments=args.prefill_segment or engine.SEGMENTS,
        input_lens=args.input_len or engine.INPUT_LENS,
        budgets=args.max_num_batched_tokens or engine.BUDGETS,
        num_prompts=args.num_prompts,
        attention_only=args.attention_only,
        enforce_eager=args.enforce_eager,
        name=args.name,
        output_dir=args.output_dir,
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
    from spectral_paged.benchmarks.throughput import plots, run, suites, workload

    if args.plot:
        name = args.name or "gains"
        print(plots.draw_gains(args.plot, args.backend, args.output_dir / f"{name}.png"))
        return 0
    if args.suite:
        return suites.main(
            args.suite,
            only=args.only,
            backends=args.backend,
            quantization=args.quantization,
            append=args.append,
            output_dir=args.output_dir,
        )
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
            input_lens=args.input_len,
            max_num_seqs=args.max_num_seqs or (LLMOptions.max_num_seqs,),
            profile=args.profile,
            decode_only=args.decode_only,
            fit=args.fit,
            **{name: getattr(args, name) for name in SERVED},
            name=args.name,
            append=args.append,
            output_dir=args.output_dir,
        )
    )


def bench_served(args: argparse.Namespace) -> int:
    """Ask whole engines for needles and next tokens, and compare their answers."""
    from spectral_paged.benchmarks.served import run as served

    return served.main(
        served.Options(
            model=args.model,
            backends=args.backend or served.BACKENDS,
            lengths=sorted(set(args.length)) or (2048,),
            needles=args.needles,
            windows=args.windows,
            places=args.places,
            device=args.device,
            dtype=args.dtype,
            kv_cache_bytes=args.kv_cache_bytes,
            gpu_memory_utilization=args.gpu_memory_utilization,
            max_num_seqs=args.max_num_seqs,
            name=args.name,
            output_dir=args.output_dir,
        )
    )


def bench_store(args: argparse.Namespace) -> int:
    """Time prompts that come back from host memory and disk, and workloads with and without."""
    from spectral_paged.benchmarks.store import run as store

    return store.main(
        store.Options(
            suite=args.suite,
            only=args.only,
            kv_format=args.kv_format,
            device=args.device,
            dtype=args.dtype,
            kv_store=None if args.kv_store is None else Path(args.kv_store),
            num_conversations=args.conversations,
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
    if args.bench == "host":
        return bench_host(args)
    if args.bench == "speculation":
        return bench_speculation(args)
    if args.bench == "prompts":
        return bench_prompts(args)
    if args.bench == "capacity":
        return bench_capacity(args)
    if args.bench == "throughput":
        return bench_throughput(args)
    if args.bench == "store":
        return bench_store(args)
    if args.bench == "served":
        return bench_served(args)
    if args.plot:
        return run.plot(args.plot, args.output_dir)
    return run.main(
        run.Options(
            model=args.model,
            device=args.device,
            dtype=args.dtype,
            formats=args.format,
            variants=args.variant,
            peers=not args.no_peers,
            sections=[s.strip() for s in args.sections.split(",") if s.strip()],
            quick=args.quick,
            lengths=sorted(set(args.length)),
            windows=args.windows,
            needles=args.needles,
            samples=args.samples,
            texts=args.text,
            calibration=args.calibration,
            journal=args.journal,
            output_dir=args.output_dir,
            time_limit=args.time_limit,
            report_only=args.report_only,
        )
    )
