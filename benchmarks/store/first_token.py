"""Seconds until the first token of a prompt: computed, in the pool, in host memory, on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spectral_paged.benchmarks.store.answers import Answer, ask, moved
from spectral_paged.benchmarks.store.disk_speed import drop_cached
from spectral_paged.benchmarks.store.engines import Bench
from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.llm import LLM

SOURCES = ("cold", "gpu", "host", "disk")


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Times of prompts of one length from one source.

    seconds: of each prompt. cached: tokens that were not computed, by tier, of the last one.
    load_bytes, load_seconds: of one more load alone, while no model runs; 0 where nothing loads.
    """

    source: str
    input_len: int
    seconds: list[float]
    cached: dict[str, int]
    load_bytes: int = 0
    load_seconds: float = 0.0

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def load_rate(self) -> float:
        """Bytes a second of the load alone."""
        return self.load_bytes / self.load_seconds if self.load_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """The tokens that bytes of host memory hold, for prompts of one length.

    tokens: of the hits that they give. exact_bytes: what their K and V take in the model's dtype.
    """

    input_len: int
    tokens: int
    bytes: int
    exact_bytes: int


def _load(llm: LLM, prompt: list[int], tier: str) -> tuple[int, float]:
    """Bring a prefix into the pool alone; returns the bytes and the seconds."""
    before = llm.stats()
    begin = time.perf_counter()
    while not llm.cache.prefetch("load", num_prompt_tokens=len(prompt), token_ids=prompt):
        time.sleep(1e-4)
    seconds = time.perf_counter() - begin
    llm.cache.cancel_prefetch("load")
    return moved(before, llm.stats())["read_bytes"][tier], seconds


def measure(bench: Bench) -> Iterator[FirstToken | Held]:
    """Time prompts from each source; those from disk in a second engine, as after a restart.

    Raises:
        ArithmeticError: a prompt that came back has another answer than one that was computed.
    """
    sizes, folder = bench.sizes, bench.folder / "first-token"
    store = {"kv_host_memory": sizes.prompts_host_bytes, "kv_store": str(folder)}
    prompts = {
        length: [bench.tokens(1000 * length + i, length) for i in range(count)]
        for length, count in sizes.lengths.items()
    }
    jobs = [Job([1] * max(prompts), 16)]
    how: dict[str, Any] = {"seats": 1, "cache_bytes": sizes.prompts_cache_bytes, "store": store}
    cold: dict[int, list[Answer]] = {}
    with bench.engine(jobs, **how) as llm:
        bench.check(llm, min(prompts), stored=True)
        llm.cache.reset_prefix_cache(reset_store=True)
        for length, some in prompts.items():
            llm.cache.reset_prefix_cache()
            before = _bytes_held(llm)
            again, cold[length] = [], []
            for prompt in some:
                cold[length].append(ask(llm, prompt))
                again.append(ask(llm, prompt))
            num_bytes = _bytes_held(llm) - before
            yield _row(bench, "cold", length, cold[length], cold[length])
            yield _row(bench, "gpu", length, cold[length], again)
            llm.cache.reset_prefix_cache()
            load = _load(llm, some[0], "host")
            found = []
            for prompt in some:
                llm.cache.reset_prefix_cache()
                found.append(ask(llm, prompt))
            yield _row(bench, "host", length, cold[length], found, load)
            tokens = sum(answer.cached["host"] for answer in found)
            yield Held(length, tokens, num_bytes, tokens * bench.token_bytes)
    drop_cached(folder)
    with bench.engine(jobs, **how) as llm:
        for length, some in prompts.items():
            load = _load(llm, some[0], "disk")
            llm.cache.reset_prefix_cache()
            found = [ask(llm, prompt) for prompt in some[1:]]
            yield _row(bench, "disk", length, cold[length][1:], found, load)


def _bytes_held(llm: LLM) -> int:
    held: Any = llm.stats()["store_bytes"]
    return int(held["host"])


def _row(
    bench: Bench,
    source: str,
    length: int,
    cold: Sequence[Answer],
    found: Sequence[Answer],
    load: tuple[int, float] = (0, 0.0),
) -> FirstToken:
    for one, other in zip(cold, found, strict=True):
        bench.compare(one, other, f"a prompt of {length} tokens from {source}")
    return FirstToken(source, length, [a.seconds for a in found], found[-1].cached, *load)
