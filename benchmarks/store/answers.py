"""Requests of `bench store`: timed alone or many at once, and compared token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectral_paged.benchmarks.quality.summary import percentile
from spectral_paged.benchmarks.throughput.backends import Times
from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.llm import LLM
from spectral_paged.outputs import Logprob
from spectral_paged.sampling import SamplingParams

NUM_TOKENS = 8  # compared of an answer
NUM_LOGPROBS = 5
COUNTERS = {
    "hit_tokens": "prefix_hit_tokens_by_tier",
    "written_bytes": "store_written_bytes",
    "read_bytes": "store_read_bytes",
    "evicted_records": "store_evicted_records",
    "dropped_records": "store_dropped_records",
    "failures": "store_failures",
}
NEAR = 0.1  # log-probabilities so close are a tie, which the order of additions decides


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was computed alone.

    seconds: until its first token. cached: tokens that were not computed, by tier.
    """

    seconds: float
    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cached: dict[str, int]


def random_tokens(seed: int, length: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()


def ask(llm: LLM, prompt: list[int]) -> Answer:
    """Have a prompt answered by an engine that has nothing else to do.

    Raises:
        SpectralPagedError: the request failed.
    """
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=NUM_LOGPROBS
    )
    seconds = None
    begin = time.perf_counter()
    llm.engine.add_request("alone", prompt, params)
    while llm.engine.has_unfinished():
        for output in llm.engine.step():
            if output.error is not None:
                raise output.error
            if seconds is None and output.outputs[0].token_ids:
                seconds = time.perf_counter() - begin
            last = output
    assert seconds is not None, "a request ends with tokens or an error"
    done, metrics = last.outputs[0], last.metrics
    host, disk = metrics.num_host_cached_tokens, metrics.num_disk_cached_tokens
    cached = {"gpu": metrics.num_cached_tokens - host - disk, "host": host, "disk": disk}
    return Answer(seconds, list(done.token_ids), list(done.logprobs or []), cached)


def check_equal(cold: Answer, warm: Answer, what: str) -> bool:
    """Compare an answer of a prompt that came back with that of the same prompt computed; False:
    they part at a tie, which additions in another order decide.

    Raises:
        ArithmeticError: they differ by more.
    """
    pairs = zip(cold.tokens, warm.tokens, cold.logprobs, strict=True)
    for place, (one, other, found) in enumerate(pairs):
        if one == other:
            continue
        if other in found and found[one].logprob - found[other].logprob < NEAR:
            return False
        raise ArithmeticError(
            f"{what}: token {place} is {other}, and {one} where the prompt is computed; not timed"
        )
    return True


def serve(llm: LLM, jobs: Sequence[Job]) -> tuple[Times, float]:
    """Serve all jobs, added at once; returns the times of their tokens, and all seconds.

    Raises:
        ArithmeticError: a request ended with tokens missing.
        SpectralPagedError: a request failed.
    """
    times = Times()
    begin = time.perf_counter()
    for i, job in enumerate(jobs):
        params = SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
        llm.engine.add_request(str(i), job.prompt_token_ids, params)
    while llm.engine.has_unfinished():
        outputs = llm.engine.step()
        times.note(time.perf_counter() - begin, outputs)
    elapsed = time.perf_counter() - begin
    times.check("store", {str(i): job.output_len for i, job in enumerate(jobs)})
    return times, elapsed


def moved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What was counted in each tier between two `llm.stats()`."""
    return {
        name: {tier: count - before[key][tier] for tier, count in after[key].items()}
        for name, key in COUNTERS.items()
    }


def milliseconds(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and p99 of `seconds`, in milliseconds."""
    ms = [1e3 * value for value in seconds]
    return {"p50": percentile(ms, 0.5), "p99": percentile(ms, 0.99)}
