"""Backends that serve the requests of a throughput run: this engine, and transformers."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from spectral_paged.benchmarks.throughput.filling import fill_instead_of_prefill
from spectral_paged.benchmarks.throughput.random_models import is_random
from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.conformance.inputs import random_calibration
from spectral_paged.device import StepClock
from spectral_paged.integrations.padded_rows import left_padded
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.llm import LLM
from spectral_paged.models.attention_choice import use_attention
from spectral_paged.models.loader import LoadedModel
from spectral_paged.options import LLMOptions
from spectral_paged.pages import PageFormat
from spectral_paged.sampling import SamplingParams

FITTING = 0.97  # share taken of the sequences that fit once all prompts are sealed
CONTINUOUS_BLOCK = 256  # tokens of a block in transformers' continuous batching, its default


@dataclass(slots=True)
class Served:
    """The outcome of a run that generated every token of every job; times in seconds.

    elapsed: from the first request to the last token.
    jobs: the requests that were served.
    first, gaps: until each request's first token, and between its tokens; empty if the backend
        does not report them.
    decode_rate: tokens a second while every request decodes.
    """

    elapsed: float
    jobs: Sequence[Job]
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    breakdown: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    decode_rate: float | None = None


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def forget(device: torch.device) -> None:
    """Free the memory of an earlier backend."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def off_the_gpu(loaded: LoadedModel) -> Iterator[None]:
    """Keep a model off its GPU, for another process that needs the memory."""
    device = loaded.model.device
    if device.type == "cuda":
        loaded.model.to("cpu")
        forget(device)
    try:
        yield
    finally:
        if device.type == "cuda":
            loaded.model.to(device)


def needs_calibration(preset: str) -> bool:
    """True for a preset whose pages need a calibration, whatever the model's heads."""
    return PageFormat.preset(preset, num_kv_heads=1, head_dim=64).needs_calibration


def engine_of(loaded: LoadedModel, kv_format: str, options: dict[str, Any]) -> LLM:
    """An LLM over a model; one with random weights gets a made-up calibration."""
    geometry = loaded.geometry
    format = PageFormat.preset(
        kv_format,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        prefill_segment=options.get("prefill_segment", LLMOptions.prefill_segment),
    )
    if is_random(loaded.name):
        options = options | {"calibration": random_calibration(format, loaded)}
    return LLM(loaded, kv_format=format, **options)


@dataclass(slots=True)
class Times:
    """Times, in seconds from the start of a run, at which requests got their tokens."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    steps: list[tuple[float, int]] = field(default_factory=list)  # when, tokens of all

    def note(self, now: float, outputs: Sequence[Any]) -> None:
        """Note the outputs of a step, of this engine or of vLLM.

        Raises:
            SpectralPagedError: a request of this engine failed.
        """
        total = 0
        for output in outputs:
            if getattr(output, "error", None) is not None:
                raise output.error
            key = output.request_id
            count = len(output.outputs[0].token_ids)
            new = count - self.counts.get(key, 0)
            if new and key in self.last:
                self.gaps.append(now - self.last[key])
            elif new:
                self.first[key] = now
            if new:
                self.last[key], self.counts[key] = now, count
            total += new
            if output.finished:
                self.finished.append(now)
        if total:
            self.steps.append((now, total))

    def check(self, backend: str, wanted: dict[str, int]) -> None:
        """Refuse times of a run in which a request did not get as many tokens as are wanted.

        Raises:
            ArithmeticError: tokens are missing.
        """
        if self.counts != wanted:
            missing = sum(wanted.values()) - sum(self.counts.values())
            raise ArithmeticError(f"{backend}: {missing} tokens are missing; not timed")

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second while every request decodes, or None if there is no such time.

        That time is from the last first token to the first end of a request."""
        begin, end = max(self.first.values()), min(self.finished)
        inside = [(at, count) for at, count in self.steps if begin < at <= end]
        if len(inside) < 2:
            return None
        return sum(count for _, count in inside) / (inside[-1][0] - begin)


def fitting(jobs: Sequence[Job], room: int, max_num_seqs: int) -> Sequence[Job]:
    """As many jobs as run at once where `room` sequences of their length fit.

    Some room is left for the last segments of prompts, whose blocks are exact until they end.
    """
    return jobs[: max(1, min(int(FITTING * room), max_num_seqs))]


def serve_with_pages(
    loaded: LoadedModel,
    jobs: Sequence[Job],
    *,
    kv_format: str,
    options: dict[str, Any],
    profile: bool = False,
    decode_only: bool = False,
    fit: bool = False,
) -> Served:
    """Serve all jobs with this engine, added at once; greedy, no token ends a request early.

    Args:
        options: further arguments of `LLM`.
        profile: measure where the time goes, which slows the run down.
        decode_only: store made-up K and V instead of computing prompts (see `filling`).
        fit: serve only as many jobs as the cache holds at once.

    Raises:
        ArithmeticError: a request ended with tokens missing.
    """
    device = loaded.model.device
    forget(device)
    llm = engine_of(loaded, kv_format, options)
    if decode_only:
        fill_instead_of_prefill(llm.engine, loaded.geometry.vocab_size)
    if fit:
        longest = max(len(job.prompt_token_ids) + job.output_len for job in jobs)
        jobs = fitting(jobs, llm.cache.concurrency(longest), llm.cache.max_num_seqs)
    warm_up(llm, jobs)
    if profile:
        llm.engine.use_clock(StepClock(device))
    _reset_peak(device)
    times = Times()
    begin = time.perf_counter()
    for i, job in enumerate(jobs):
        params = SamplingParams(
            temperature=0.0, max_tokens=job.output_len, ignore_eos=True, detokenize=False
        )
        llm.engine.add_request(str(i), job.prompt_token_ids, params)
    most = 0
    while llm.engine.has_unfinished():
        outputs = llm.engine.step()
        times.note(time.perf_counter() - begin, outputs)
        most = max(most, len(llm.engine.scheduler.running))
    elapsed = time.perf_counter() - begin
    times.check(kv_format, {str(i): job.output_len for i, job in enumerate(jobs)})
    stats = llm.stats() | {"most_running": most}
    seconds = dict(llm.engine.clock.seconds) if profile else {}
    peak = _peak(device)
    llm.close()  # the next backend needs the model with transformers' own attention
    rate, first, gaps = times.decode_rate, list(times.first.values()), times.gaps
    return Served(elapsed, jobs, first, gaps, seconds, stats, peak, rate)


def warm_up(llm: LLM, jobs: Sequence[Job]) -> None:
    """Compile the kernels that the run will need, and capture its graphs."""
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    longest = max(len(job.prompt_token_ids) for job in jobs)
    for length in sorted({3, min(longest, 2 * BLOCK_TOKENS), min(longest, 4 * BLOCK_TOKENS + 5)}):
        prompts = [{"prompt_token_ids": [1] * length}] * min(2, len(jobs))
        llm.generate(prompts, params, use_tqdm=False)
    llm.cache.reset_prefix_cache()
    longest = max(len(job.prompt_token_ids) + job.output_len for job in jobs)
    llm.warm_up(num_seqs=len(jobs), num_tokens=longest)


@torch.inference_mode()
def serve_with_generate(
    loaded: LoadedModel, jobs: Sequence[Job], *, batch_size: int, attention: str = "sdpa"
) -> Served:
    """Serve all jobs with transformers' `generate`, in static, left-padded batches.

    Jobs are sorted by length so that little is padded. A batch runs until its longest output is
    done; tokens past a request's own length do not count."""
    model, device = loaded.model, loaded.model.device
    forget(model.device)
    order = sorted(jobs, key=lambda job: (len(job.prompt_token_ids), job.output_len))
    with use_attention(model, attention):
        _generate(model, order[:1], 2)
        _reset_peak(device)
        begin = time.perf_counter()
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            _generate(model, batch, max(job.output_len for job in batch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - begin
    return Served(
        elapsed,
        jobs,
        stats={"backend": f"transformers generate, {attention}"},
        peak_memory_bytes=_peak(device),
    )


def serve_with_continuous_batching(
    loaded: LoadedModel,
    jobs: Sequence[Job],
    *,
    max_num_batched_tokens: int,
    kv_cache_bytes: int | None = None,
    attention: str = "sdpa",
) -> Served:
    """Serve all jobs with transformers' continuous batching, added at once.

    It uses the paged form of `attention` and the engine's budgets of cache and tokens a step.

    Args:
        max_num_batched_tokens: most tokens of a step.
        kv_cache_bytes: size of the cache; None lets transformers choose.

    Raises:
        ArithmeticError: a request came back with an error or with another number of tokens.
    """
    model, device = loaded.model, loaded.model.device
    forget(model.device)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=2)
    num_blocks = None
    if kv_cache_bytes is not None:
        geometry, itemsize = loaded.geometry, model.dtype.itemsize
        token = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * itemsize
        num_blocks = max(1, kv_cache_bytes // token // CONTINUOUS_BLOCK)
    budgets = ContinuousBatchingConfig(
        block_size=CONTINUOUS_BLOCK, num_blocks=num_blocks, max_batch_tokens=max_num_batched_tokens
    )
    with (
        use_attention(model, attention),
        model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=budgets
        ) as manager,
    ):
        manager.add_request([1, 2, 3], request_id="warm-up", max_new_tokens=2)
        _collect(manager, {"warm-up"})
        _reset_peak(device)
        begin = time.perf_counter()
        for i, job in enumerate(jobs):
            manager.add_request(
                job.prompt_token_ids,
                request_id=str(i),
                max_new_tokens=job.output_len,
                eos_token_id=-1,
            )
        done = _collect(manager, {str(i) for i in range(len(jobs))})
        elapsed = time.perf_counter() - begin
    for i, job in enumerate(jobs):
        result = done[str(i)]
        if result.error is not None or len(result.generated_tokens) != job.output_len:
            raise ArithmeticError(
                f"continuous batching gave {len(result.generated_tokens)} of {job.output_len} "
                f"tokens ({result.error}); not timed"
            )
    return Served(
        elapsed,
        jobs,
        stats={"backend": f"transformers continuous batching, paged {attention}"},
        peak_memory_bytes=_peak(device),
    )


def _collect(manager: Any, wanted: set[str]) -> dict[str, Any]:
    """Results of the requests `wanted`, once all are finished."""
    done: dict[str, Any] = {}
    while len(done) < len(wanted):
        result = manager.get_result(timeout=1.0)
        if result is None:
            if not manager.is_running():
                raise ArithmeticError(f"continuous batching stopped with {len(done)} done")
        elif result.request_id in wanted and result.is_finished():
            done[result.request_id] = result
    return done


def _generate(model: Any, batch: Sequence[Job], num_tokens: int) -> None:
    inputs = left_padded([job.prompt_token_ids for job in batch], model.device)
    found = model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    if found.shape != (len(batch), inputs["input_ids"].shape[1] + num_tokens):
        raise ArithmeticError(f"generate gave {list(found.shape)} tokens; not timed")
