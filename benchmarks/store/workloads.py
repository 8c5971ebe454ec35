"""Workloads whose prompts come back, with a store and without, and one whose prompts never do.

```
turns       conversations that all go on by a turn, again and again; the pool holds few of them
documents   documents that are asked question after question, round by round
nohit       requests that have nothing in common
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from spectral_paged.benchmarks.store.answers import milliseconds, moved, serve
from spectral_paged.benchmarks.store.disk_speed import drop_cached
from spectral_paged.benchmarks.store.engines import Bench
from spectral_paged.benchmarks.throughput.backends import off_the_gpu
from spectral_paged.benchmarks.throughput.vllm_server import VLLMServer
from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.llm import LLM
from spectral_paged.options import LLMOptions

OFF, HOST, RESTARTED, DISK = "off", "host", "restarted", "host and disk"
ROUNDS = 2  # of the workload without hits, each with and without a store


@dataclass(frozen=True, slots=True)
class Row:
    """A round of a workload: requests that were added at once.

    store: `off`, `host`, `restarted` (a new engine over a folder), `host and disk`, or an engine.
    round: the turn, the question, or -1 where documents are sealed.
    ttft_ms, itl_ms: median and p99. moved: counters by tier.
    """

    store: str
    round: int
    seconds: float
    num_requests: int
    prompt_tokens: int
    ttft_ms: dict[str, float | None]
    itl_ms: dict[str, float | None]
    moved: dict[str, dict[str, int]]


def _round(llm: LLM, store: str, number: int, jobs: Sequence[Job]) -> Row:
    before = llm.stats()
    times, seconds = serve(llm, jobs)
    return Row(
        store,
        number,
        seconds,
        len(jobs),
        sum(len(job.prompt_token_ids) for job in jobs),
        milliseconds(list(times.first.values())),
        milliseconds(times.gaps),
        moved(before, llm.stats()),
    )


def turns_of(bench: Bench) -> list[list[Job]]:
    """The requests of each turn.

    A turn's prompt is the one before and `turn_len` more tokens, which stand for the answer and for
    what is asked next."""
    sizes = bench.sizes
    prompts = [bench.tokens(i, sizes.first_len) for i in range(sizes.num_conversations)]
    turns = []
    for number in range(sizes.num_turns):
        turns.append([Job(list(prompt), sizes.answer_len) for prompt in prompts])
        for i, prompt in enumerate(prompts):
            prompt += bench.tokens(10**6 * (number + 1) + i, sizes.turn_len)
    return turns


def measure_turns(bench: Bench) -> Iterator[Row]:
    """Serve conversations turn by turn; raises as `Bench.check`."""
    sizes, turns = bench.sizes, turns_of(bench)
    num_bytes = sizes.num_conversations * sizes.conversation_bytes
    for name in (OFF, HOST):
        store: dict[str, Any] = {} if name == OFF else {"kv_host_memory": num_bytes}
        with bench.engine(
            turns[-1], seats=sizes.seats, cache_bytes=sizes.kv_cache_bytes, store=store
        ) as llm:
            bench.check(llm, sizes.first_len, stored=bool(store))
            llm.cache.reset_prefix_cache(reset_store=True)
            for number, jobs in enumerate(turns):
                yield _round(llm, name, number, jobs)


def measure_turns_in_vllm(bench: Bench) -> Iterator[Row]:
    """Serve the same conversations in vLLM, which offloads its cache to as many bytes of host
    memory.

    Raises:
        MissingPackageError: no vLLM, or one that was not tried.
    """
    sizes, turns = bench.sizes, turns_of(bench)
    longest = max(len(job.prompt_token_ids) + job.output_len for job in turns[-1])
    options = LLMOptions(
        max_num_seqs=sizes.seats,
        max_model_len=longest + 1,
        kv_cache_bytes=sizes.kv_cache_bytes,
        kv_host_memory=sizes.num_conversations * sizes.conversation_bytes,
    )
    with off_the_gpu(bench.loaded), closing(VLLMServer("vllm", bench.loaded, options)) as server:
        for number, jobs in enumerate(turns):
            served = server.serve(jobs)
            yield Row(
                "vllm, offloading",
                number,
                served.elapsed,
                len(jobs),
                sum(len(job.prompt_token_ids) for job in jobs),
                milliseconds(served.first),
                milliseconds(served.gaps),
                {},
            )


def measure_documents(bench: Bench) -> Iterator[Row]:
    """Ask documents, without a store, with documents that are sealed first, and after a restart;
    raises as `Bench.check`."""
    sizes, folder = bench.sizes, bench.folder / "documents"
    documents = [bench.tokens(i, sizes.document_len) for i in range(sizes.num_documents)]
    rounds = [
        [
            Job(document + bench.tokens(10**6 * (number + 1) + i, sizes.question_len), length)
            for i, document in enumerate(documents)
        ]
        for number, length in enumerate([sizes.answer_len] * sizes.num_questions)
    ]
    kept = {"kv_host_memory": sizes.documents_host_bytes, "kv_store": str(folder)}
    for name in (OFF, HOST, RESTARTED):
        store: dict[str, Any] = {} if name == OFF else kept
        if name == RESTARTED:
            drop_cached(folder)
        with bench.engine(
            rounds[-1],
            seats=sizes.documents_seats,
            cache_bytes=sizes.documents_cache_bytes,
            store=store,
        ) as llm:
            if name != RESTARTED:
                bench.check(llm, sizes.document_len, stored=bool(store))
            if name == HOST:
                yield _round(llm, name, -1, [Job(document, 1) for document in documents])
            for number, jobs in enumerate(rounds):
                yield _round(llm, name, number, jobs)


def measure_nohit(bench: Bench) -> Iterator[Row]:
    """Serve requests of which none comes back, with both tiers and without; raises as
    `Bench.check`."""
    sizes = bench.sizes
    kept = {"kv_host_memory": sizes.others_host_bytes, "kv_store": str(bench.folder / "others")}
    for number in range(ROUNDS):
        jobs = [
            Job(bench.tokens(10**6 * (number + 1) + i, sizes.other_len), sizes.other_answer_len)
            for i in range(sizes.num_others)
        ]
        for name in (OFF, DISK) if number % 2 else (DISK, OFF):
            with bench.engine(
                jobs,
                seats=sizes.num_others,
                cache_bytes=sizes.others_cache_bytes,
                store=kept if name == DISK else {},
            ) as llm:
                if not number:
                    bench.check(llm, sizes.other_len, stored=False)
                yield _round(llm, name, number, jobs)
