"""What serves the requests of a throughput run: this engine by format, and transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.llm import LLM
from spectral_paged.models.attention_choice import attending
from spectral_paged.models.loader import LoadedModel
from spectral_paged.sampling import SamplingParams
from spectral_paged.step_clock import StepClock

CONTINUOUS_BLOCK = 256  # tokens of a page of transformers' continuous batching, its default


@dataclass(slots=True)
class Served:
    """What a backend did, every token of every job; times in seconds from the start of the run.

    first, gaps: until each request's first token, and between its tokens; empty where a backend
        does not tell.
    """

    elapsed: float
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    breakdown: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int | None = None


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def serve_with_pages(
    loaded: LoadedModel,
    jobs: Sequence[Job],
    *,
    kv_format: str,
    options: dict[str, Any],
    profile: bool = False,
) -> Served:
    """All requests at once into this engine; greedy, no token ends a request early.

    Args:
        options: of `LLM`.
        profile: measure where the time goes; the run is slower for it.
    """
    llm = LLM(loaded, kv_format=kv_format, **options)
    device = loaded.model.device
    _warm_up(llm)
    if profile:
        llm.cache.clock = StepClock(device)
    _reset_peak(device)
    begin = time.perf_counter()
    for i, job in enumerate(jobs):
        params = SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
        llm.engine.add_request(str(i), job.prompt_token_ids, params)
    last: dict[str, float] = {}
    counts: dict[str, int] = {}
    first, gaps = [], []
    while llm.engine.has_unfinished():
        outputs = llm.engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            if output.error is not None:
                raise output.error
            key = output.request_id
            new = len(output.outputs[0].token_ids) - counts.get(key, 0)
            if new and key in last:
                gaps.append(now - last[key])
            elif new:
                first.append(now)
            if new:
                last[key], counts[key] = now, counts.get(key, 0) + new
    elapsed = time.perf_counter() - begin
    wanted = {str(i): job.output_len for i, job in enumerate(jobs)}
    if counts != wanted:
        missing = sum(wanted.values()) - sum(counts.values())
        raise ArithmeticError(f"{kv_format}: {missing} tokens are missing; not timed")
    return Served(
        elapsed,
        first,
        gaps,
        dict(llm.cache.clock.seconds) if profile else {},
        llm.stats(),
        _peak(device),
    )


def _warm_up(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 2, params, use_tqdm=False)
    llm.cache.reset_prefix_cache()


@torch.inference_mode()
def serve_with_generate(
    loaded: LoadedModel, jobs: Sequence[Job], *, batch_size: int, attention: str = "sdpa"
) -> Served:
    """transformers `generate` over static batches, left-padded, sorted by length so that little is
    padded; a batch runs until its longest output is done, tokens past a request's own length do
    not count."""
    model, device = loaded.model, loaded.model.device
    order = sorted(jobs, key=lambda job: (len(job.prompt_token_ids), job.output_len))
    with attending(model, attention):
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
    """transformers' continuous batching: all requests at once, each to its own length, with the
    paged form of `attention`, with this engine's budgets of cache and of tokens a step.

    Args:
        max_num_batched_tokens: of a step.
        kv_cache_bytes: None lets transformers choose.

    Raises:
        ArithmeticError: a request came back with an error or with another number of tokens.
    """
    model, device = loaded.model, loaded.model.device
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
        attending(model, attention),
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
                job.prompt_token_ids, request_id=str(i), max_new_tokens=job.output_len,
                eos_token_id=-1,
            )  # fmt: skip
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
    longest = max(len(job.prompt_token_ids) for job in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, job in enumerate(batch):
        ids[row, longest - len(job.prompt_token_ids) :] = torch.tensor(job.prompt_token_ids)
        mask[row, longest - len(job.prompt_token_ids) :] = 1
    found = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
        min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0,
    )  # fmt: skip
    if found.shape != (len(batch), longest + num_tokens):
        raise ArithmeticError(f"generate gave {list(found.shape)} tokens; not timed")
