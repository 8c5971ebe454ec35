"""`spectral-paged bench throughput`: backends in turn, a table, JSON with vLLM's keys, plots."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from spectral_paged.benchmarks.quality.summary import mean, percentile
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import (
    earlier_rows,
    file_stem,
    model_label,
    write_result,
)
from spectral_paged.benchmarks.throughput.backends import (
    Served,
    needs_calibration,
    off_the_gpu,
    serve_with_continuous_batching,
    serve_with_generate,
    serve_with_pages,
)
from spectral_paged.benchmarks.throughput.plots import draw
from spectral_paged.benchmarks.throughput.random_models import is_random, load_either
from spectral_paged.benchmarks.throughput.vllm_server import VLLMServer, check_backend, is_vllm
from spectral_paged.benchmarks.throughput.workload import Job, WorkloadOptions, jobs_of
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.calibration import builtin_calibration
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.weight_quantization import check_device, check_method, quantized
from spectral_paged.options import LLMOptions

GENERATE = "transformers"
CONTINUOUS = "transformers-continuous"
BACKENDS = ("exact", "auto", GENERATE, CONTINUOUS)


@dataclass(frozen=True)
class Options:
    """Arguments of `bench throughput`.

    backends: presets of this engine, `transformers` (static batches of `generate`),
        `transformers-continuous` (its continuous batching, which chooses its batches itself), or
        names of `VLLMServer`.
    max_num_seqs: one run a value; for `transformers`, the batch size.
    quantization: of the weights, for every backend.
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
    quantization: str | None = LLMOptions.quantization
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
    append: bool = False  # to the rows of an earlier run of the same workload on the same machine
    output_dir: Path = field(default_factory=lambda: Path("benchmarks/results"))

    def of_engine(self, max_num_seqs: int) -> dict[str, Any]:
        """The options that are those of an `LLM`, for a run of one value of `max_num_seqs`."""
        return {
            "quantization": self.quantization,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "kv_cache_bytes": self.kv_cache_bytes,
            "enable_prefix_caching": self.enable_prefix_caching,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_model_len,
            "enforce_eager": self.enforce_eager,
        }


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
    return serve_with_pages(
        loaded,
        jobs,
        kv_format=backend,
        options=o.of_engine(batch),
        profile=o.profile,
        decode_only=o.decode_only,
        fit=o.fit,
    )


class Servers:
    """The backends of a session: vLLM, once started, serves until another backend is asked for.

    Args:
        max_model_len: tokens of the longest request of all workloads, for vLLM.
    """

    def __init__(self, loaded: LoadedModel, max_model_len: int) -> None:
        self.loaded = loaded
        self._max_model_len = max_model_len
        self._away = ExitStack()  # while vLLM runs
        self._vllm: VLLMServer | None = None
        self._key: tuple[Any, ...] = ()

    def close(self) -> None:
        """End vLLM, if it runs, and put the model back on its device."""
        if self._vllm is not None:
            self._vllm.close()
            self._vllm, self._key = None, ()
        self._away.close()

    def serve(self, backend: str, jobs: Sequence[Job], batch: int, o: Options) -> Served:
        """Serve `jobs` with one backend."""
        if is_vllm(backend):
            return self._started(backend, batch, o).serve(jobs, fit=o.fit)
        self.close()
        return serve(self.loaded, backend, jobs, batch, o)

    def _started(self, backend: str, batch: int, o: Options) -> VLLMServer:
        options = LLMOptions(**o.of_engine(batch) | {"max_model_len": self._max_model_len})
        if self._vllm is None or (backend, options) != self._key:
            self.close()
            self._away.enter_context(off_the_gpu(self.loaded))
            self._vllm = VLLMServer(backend, self.loaded, options)
            self._key = backend, options
        return self._vllm


class Report:
    """One workload, its rows so far, and the file that they are written to.

    Raises:
        InvalidRequestError: no backend, one that does not do what is asked for, or a workload that
            the model does not take, or a file to append to that was measured otherwise.
    """

    def __init__(self, options: Options, loaded: LoadedModel) -> None:
        if not options.backends:
            raise InvalidRequestError("no --backend: give a preset, exact, or transformers")
        for backend in filter(is_vllm, options.backends):
            check_backend(
                backend,
                decode_only=options.decode_only,
                profile=options.profile,
                quantization=options.quantization,
            )
        self.options = options
        self.lengths = options.input_lens or (options.workload.input_len,)
        self.jobs = {
            length: jobs_of(
                replace(options.workload, input_len=length),
                loaded.geometry.vocab_size,
                loaded.geometry.max_position_embeddings,
                loaded.tokenizer,
            )
            for length in self.lengths
        }
        workload = asdict(options.workload)
        workload["dataset_path"] = str(options.workload.dataset_path or "")
        environ = {"device": choose_device(options.device).type, "dtype": str(loaded.model.dtype)}
        self.rows: list[dict[str, Any]] = []
        self.result = {
            "environment": environment() | environ,
            "model": model_label(options.model),
            "quantization": options.quantization,
            "workload": workload,
            "profiled": options.profile,
            "decode_only": options.decode_only,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "rows": self.rows,
        }
        options.output_dir.mkdir(parents=True, exist_ok=True)  # fails before the work
        self.stem = f"throughput-{options.name or file_stem(options.model)}"
        if options.append:
            rows = earlier_rows(options.output_dir / f"{self.stem}.json", self.result)
            self.rows += [row for row in rows if row["backend"] not in options.backends]

    @property
    def longest(self) -> int:
        """The tokens of the longest request with its output."""
        jobs = [job for some in self.jobs.values() for job in some]
        return max(len(job.prompt_token_ids) + job.output_len for job in jobs)

    def measure(self, backend: str, servers: Servers) -> None:
        """Serve the workload with `backend`; print and write a row a length and batch."""
        options = self.options
        for length, batch in product(self.lengths, options.max_num_seqs):
            some = self.jobs[length]
            some = some if options.rounds is None else some[: options.rounds * batch]
            served = servers.serve(backend, some, batch, options)
            self.rows.append(row_of(backend, batch, served) | {"input_len": length})
            print(f"{length} tokens in, {line(self.rows[-1])}", flush=True)
            self.path = write_result(options.output_dir, self.stem, self.result)

    def end(self) -> None:
        """Name the file, and draw the plots of runs over several batches or lengths."""
        print(f"raw results: {self.path}")
        axes = ("max_num_seqs", self.options.max_num_seqs), ("input_len", self.lengths)
        for key, values in axes:
            if len(values) > 1:
                over = "" if key == "max_num_seqs" else "-over-input-len"
                print(draw(self.result, self.options.output_dir / f"{self.stem}{over}.png", key))


def measure_all(reports: Sequence[Report], loaded: LoadedModel) -> None:
    """Measure workloads, a backend at a time, so that vLLM starts once for all of them."""
    servers = Servers(loaded, max(report.longest for report in reports))
    try:
        for backend in dict.fromkeys(b for report in reports for b in report.options.backends):
            for report in reports:
                if backend in report.options.backends:
                    if len(reports) > 1:
                        print(f"-- {report.options.name}", flush=True)
                    report.measure(backend, servers)
    finally:
        servers.close()
    for report in reports:
        report.end()


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
    if "most_running" in stats:
        text += f", {stats['most_running']} at once"
    if "capacity_sequences" in stats:
        text += f", {stats['capacity_sequences']} fit"
    if "preemptions" in stats:
        text += f", {stats['preemptions']} preemptions"
    if "pages_sealed" in stats:
        text += f", {stats['pages_sealed']} pages sealed"
    return text


def load(options: Options) -> LoadedModel:
    """The model of a run; for vLLM alone, which loads its own weights, it stays off the GPU.

    Raises:
        InvalidRequestError: its weights cannot be quantized as the options say.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    method = options.quantization
    check_method(method)
    check_device(method, device, dtype)
    if all(map(is_vllm, options.backends)):
        device, method = torch.device("meta" if is_random(options.model) else "cpu"), None
    loaded = load_either(options.model, device=device, dtype=dtype)
    if method is None:
        return loaded
    others = (GENERATE, CONTINUOUS)
    ours = [name for name in options.backends if name not in others and not is_vllm(name)]
    if any(map(needs_calibration, ours)) and not is_random(loaded.name):
        builtin_calibration(loaded)  # is kept, and cannot be made of quantized weights
    return quantized(loaded, method, device)


def main(options: Options, loaded: LoadedModel | None = None) -> int:
    """Measure, print, write `throughput-<model>.json` and, over several batches, a plot.

    Args:
        loaded: the model, if it is loaded already.

    Raises:
        InvalidRequestError: no backend, or a workload that the model does not take.
    """
    loaded = load(options) if loaded is None else loaded
    measure_all([Report(options, loaded)], loaded)
    return 0
