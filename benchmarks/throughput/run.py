"""`spectral-paged bench throughput`: backends in turn, a table, JSON with vLLM's keys, plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from spectral_paged.benchmarks.quality.summary import mean, percentile
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, model_label, write_result
from spectral_paged.benchmarks.throughput.backends import (
    Served,
    serve_with_continuous_batching,
    serve_with_generate,
    serve_with_pages,
)
from spectral_paged.benchmarks.throughput.random_models import load_either
from spectral_paged.benchmarks.throughput.workload import Job, WorkloadOptions, jobs_of
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.loader import LoadedModel
from spectral_paged.options import LLMOptions

GENERATE = "transformers"
CONTINUOUS = "transformers-continuous"
BACKENDS = ("exact", "auto", GENERATE, CONTINUOUS)


@dataclass(frozen=True)
class Options:
    """Arguments of `bench throughput`.

    backends: presets of this engine, `transformers` (static batches of `generate`), or
        `transformers-continuous` (its continuous batching, which chooses its batches itself).
    max_num_seqs: one run a value; for `transformers`, the batch size.
    input_lens: one run a value, in place of the workload's own.
    rounds: serve only `rounds * max_num_seqs` of the requests.
    fit: serve only as many of the requests as a backend's cache holds at once.
    decode_only: make up this engine's contexts instead of computing them.
    name: stem of the result's files; default the model's.
    """

    model: str
    workload: WorkloadOptions
    backends: Sequence[str] = BACKENDS
    device: str = LLMOptions.device
    dtype: str = "auto"
    input_lens: Sequence[int] = ()
    max_num_seqs: Sequence[int] = (LLMOptions.max_num_seqs,)
    max_num_batched_tokens: int = LLMOptions.max_num_batched_tokens
    kv_cache_bytes: int | None = LLMOptions.kv_cache_bytes
    enable_prefix_caching: bool = LLMOptions.enable_prefix_caching
    profile: bool = False
    decode_only: bool = False
    fit: bool = False
    rounds: int | None = None
    gpu_memory_utilization: float = LLMOptions.gpu_memory_utilization
    max_model_len: int | None = LLMOptions.max_model_len
    enforce_eager: bool = LLMOptions.enforce_eager
    name: str = ""
    output_dir: Path = field(default_factory=lambda: Path("benchmarks/results"))


def latency(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean, median, p99 and maximum in milliseconds of `values` in seconds; None without any."""
    if not values:
        return None
    ms = [1e3 * value for value in values]
    return {
        "mean": mean(ms),
        "p50": percentile(ms, 0.5),
        "p99": percentile(ms, 0.99),
        "max": max(ms),
    }


def row_of(backend: str, max_num_seqs: int, served: Served) -> dict[str, Any]:
    """The row of one run, with the keys of vLLM's throughput benchmark first."""
    jobs = served.jobs
    outputs = sum(job.output_len for job in jobs)
    total = outputs + sum(len(job.prompt_token_ids) for job in jobs)
    other = served.elapsed - sum(served.breakdown.values())
    return {
        "backend": backend,
        "elapsed_time": served.elapsed,
        "num_requests": len(jobs),
        "total_num_tokens": total,
        "requests_per_second": len(jobs) / served.elapsed,
        "tokens_per_second": total / served.elapsed,
        "output_tokens_per_second": outputs / served.elapsed,
        "decode_tokens_per_second": served.decode_rate,
        "max_num_seqs": max_num_seqs,
        "ttft_ms": latency(served.first),
        "itl_ms": latency(served.gaps),
        "breakdown_seconds": served.breakdown | {"other": other} if served.breakdown else None,
        "peak_memory_bytes": served.peak_memory_bytes,
        "stats": served.stats,
    }


def serve(loaded: LoadedModel, backend: str, jobs: Sequence[Job], batch: int, o: Options) -> Served:
    """Serve `jobs` with one backend."""
    if backend == GENERATE:
        return serve_with_generate(loaded, jobs, batch_size=batch)
    if backend == CONTINUOUS:
        return serve_with_continuous_batching(
            loaded,
            jobs,
            max_num_batched_tokens=o.max_num_batched_tokens,
            kv_cache_bytes=o.kv_cache_bytes,
        )
    engine = {
        "max_num_seqs": batch,
        "max_num_batched_tokens": o.max_num_batched_tokens,
        "kv_cache_bytes": o.kv_cache_bytes,
        "enable_prefix_caching": o.enable_prefix_caching,
        "gpu_memory_utilization": o.gpu_memory_utilization,
        "max_model_len": o.max_model_len,
        "enforce_eager": o.enforce_eager,
    }
    return serve_with_pages(
        loaded,
        jobs,
        kv_format=backend,
        options=engine,
        profile=o.profile,
        decode_only=o.decode_only,
        fit=o.fit,
    )


def line(row: dict[str, Any]) -> str:
    """The text of a row on the terminal."""
    first, gaps = row["ttft_ms"], row["itl_ms"]
    text = (
        f"{row['backend']:20} batch {row['max_num_seqs']:4}: {row['elapsed_time']:8.2f} s, "
        f"{row['requests_per_second']:7.2f} requests/s, {row['tokens_per_second']:9.1f} tokens/s, "
        f"{row['output_tokens_per_second']:8.1f} output tokens/s"
    )
    if first is not None and gaps is not None:
        text += f", ttft p50 {first['p50']:.0f} ms, itl p50 {gaps['p50']:.1f} p99 {gaps['p99']:.1f}"
    if row["decode_tokens_per_second"] is not None:
        text += f", decoding {row['decode_tokens_per_second']:.1f} tokens/s"
    stats = row["stats"]
    if "preemptions" in stats:
        text += (
            f", {stats['most_running']} at once, {stats['preemptions']} preemptions, "
            f"{stats['pages_sealed']} pages sealed"
        )
    return text


def load(options: Options) -> LoadedModel:
    """The model of a run."""
    device = choose_device(options.device)
    return load_either(options.model, device=device, dtype=choose_dtype(options.dtype, device))


def main(options: Options, loaded: LoadedModel | None = None) -> int:
    """Measure, print, write `throughput-<model>.json` and, over several batches, a plot.

    Args:
        loaded: the model, if it is loaded already.

    Raises:
        InvalidRequestError: no backend, or a workload that the model does not take.
    """
    if not options.backends:
        raise InvalidRequestError("no --backend: give a preset, exact, or transformers")
    loaded = load(options) if loaded is None else loaded
    device, geometry = loaded.model.device, loaded.geometry
    lengths = options.input_lens or (options.workload.input_len,)
    jobs = {
        length: jobs_of(
            replace(options.workload, input_len=length),
            geometry.vocab_size,
            geometry.max_position_embeddings,
            loaded.tokenizer,
        )
        for length in lengths
    }
    workload = asdict(options.workload)
    workload["dataset_path"] = str(options.workload.dataset_path or "")
    rows: list[dict[str, Any]] = []
    result = {
        "environment": environment() | {"device": device.type, "dtype": str(loaded.model.dtype)},
        "model": model_label(options.model),
        "workload": workload,
        "profiled": options.profile,
        "decode_only": options.decode_only,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "rows": rows,
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    stem = f"throughput-{options.name or file_stem(options.model)}"
    for backend in options.backends:
        for length, batch in product(lengths, options.max_num_seqs):
            some = jobs[length]
            some = some if options.rounds is None else some[: options.rounds * batch]
            served = serve(loaded, backend, some, batch, options)
            rows.append(row_of(backend, batch, served) | {"input_len": length})
            print(f"{length} tokens in, {line(rows[-1])}", flush=True)
            path = write_result(options.output_dir, stem, result)
    print(f"raw results: {path}")
    for key, values in (("max_num_seqs", options.max_num_seqs), ("input_len", lengths)):
        if len(values) > 1:
            over = "" if key == "max_num_seqs" else "-over-input-len"
            print(draw(result, options.output_dir / f"{stem}{over}.png", key))
    return 0


AXES = {"max_num_seqs": "requests at once", "input_len": "tokens of a prompt"}


def draw(result: dict[str, Any], path: Path, over: str = "max_num_seqs") -> Path:
    """Draw output tokens per second over one of `AXES`; returns `path`.

    Each backend and value of the other axis has a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    [other] = AXES.keys() - {over}
    several = len({row[other] for row in result["rows"]}) > 1
    for backend, rest in dict.fromkeys((row["backend"], row[other]) for row in result["rows"]):
        points = [
            (row[over], row["output_tokens_per_second"])
            for row in result["rows"]
            if (row["backend"], row[other]) == (backend, rest)
        ]
        label = f"{backend}, {rest} {AXES[other]}" if several else backend
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(AXES[over])
    axes.set_ylabel("output tokens a second")
    axes.set_title(f"{result['model']}, {result['environment']['machine']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
