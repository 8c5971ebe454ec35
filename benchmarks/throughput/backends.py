"""What serves the requests of a throughput run: this engine by format, and transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.llm import LLM
from spectral_paged.models.loader import LoadedModel
from spectral_paged.sampling import SamplingParams
from spectral_paged.step_clock import StepClock


@dataclass(slots=True)
class Served:
    """What a backend did; times in seconds from the start of the run.

    first, gaps: until each request's first token, and between its tokens; empty where a backend
        does not tell.
    """

    elapsed: float
    prompt_tokens: int
    output_tokens: int
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
        sum(len(job.prompt_token_ids) for job in jobs),
        sum(counts.values()),
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
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    order = sorted(jobs, key=lambda job: (len(job.prompt_token_ids), job.output_len))
    try:
        _generate(model, order[:1], 2)
        _reset_peak(device)
        begin = time.perf_counter()
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            _generate(model, batch, max(job.output_len for job in batch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - begin
    finally:
        model.set_attn_implementation(before)
    return Served(
        elapsed,
        sum(len(job.prompt_token_ids) for job in jobs),
        sum(job.output_len for job in jobs),
        stats={"backend": f"transformers generate, {attention}"},
        peak_memory_bytes=_peak(device),
    )


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
