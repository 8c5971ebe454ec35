"""A small real model under random lengths, aborts, preemptions and prefix hits, for minutes."""

from __future__ import annotations

import random
import statistics
import time

import psutil
import torch

from spectral_paged import LLM, SamplingParams
from spectral_paged.conformance.inputs import random_calibration
from spectral_paged.errors import PoolError
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from support.tiny_model import VOCAB, tiny_format, tiny_model

POOL_BYTES = {"exact": 2_600_000}  # small enough that requests are preempted
LEAK_BYTES = {"cpu": 48 << 20, "cuda": 8 << 20}  # the RSS of a process is noisy
CHECK_EVERY = 50  # steps between proofs of integrity


def soak_model(seconds, seed, device, format):
    """(figures, examples of faults) of random requests for so many seconds.

    `differing` counts greedy requests whose tokens differ from an earlier run of the same request.
    On the CPU it must be 0; a GPU's matrix products depend on the size of the batch.
    """
    rng, start = random.Random(seed), time.monotonic()
    model, pages = tiny_model().to(device), tiny_format(format)
    loaded = LoadedModel("tiny", model, None, ModelGeometry.from_config(model.config))
    llm = LLM.from_model(
        model,
        kv_format=pages,
        max_num_seqs=12,
        kv_cache_bytes=POOL_BYTES.get(format, 1_000_000),
        max_num_batched_tokens=1024,
        calibration=random_calibration(pages, loaded),
        debug_poison=True,
    )
    llm.engine.async_scheduling = True  # on the CPU too
    llm.warm_up()
    soak = _Soak(llm, rng)
    memory, next_sample, until = [], start, start + seconds
    while time.monotonic() < until or llm.engine.has_unfinished():
        if time.monotonic() < until:
            soak.submit_or_abort()
        soak.step()
        if time.monotonic() >= next_sample:
            memory.append(memory_bytes(device))
            next_sample += seconds / 80
    soak.finish()
    growth = growth_bytes(memory)
    stats = llm.stats()
    if device == "cpu" and soak.row["differing"]:
        soak.row["wrong"] += soak.row["differing"]
    leaked = growth > LEAK_BYTES[torch.device(device).type]
    if leaked:
        soak.examples.append(f"memory grew by {growth:,} bytes after the warm-up")
    figures = {k: int(stats[k]) for k in ("preemptions", "prefix_hit_tokens", "pages_sealed")}
    row = (
        soak.row
        | figures
        | {
            "memory growth, KiB": growth >> 10,
            "leaks": int(leaked),
            "backend": str(stats["backend"]),
            "seconds": round(time.monotonic() - start),
        }
    )
    return row, soak.examples[:10]


def memory_bytes(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def growth_bytes(samples):
    """Growth in bytes from the second quarter of the samples (the first is warm-up) to the last."""
    quarter = max(1, len(samples) // 4)
    before = samples[quarter : 2 * quarter] or samples
    return int(statistics.median(samples[-quarter:]) - statistics.median(before))


class _Soak:
    """Random requests on an LLM: those that run, and the outcomes of those that ended."""

    def __init__(self, llm, rng):
        self.llm, self.rng = llm, rng
        self.row = dict.fromkeys(
            (
                "operations",
                "steps",
                "requests",
                "finished",
                "aborted",
                "lost",
                "failed",
                "wrong",
                "compared",
                "differing",
                "integrity",
            ),
            0,
        )
        self.examples = []
        shared = [[rng.randrange(VOCAB) for _ in range(1300)] for _ in range(3)]
        self.prompts = [
            shared[i % 3][: rng.choice([0, 64, 640, 1217])]
            + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 30, 64, 300, 577]))]
            for i in range(30)
        ]
        self.running: dict[str, int | None] = {}  # name to the prompt of a greedy request
        self.said: dict[int, list[int]] = {}

    def submit_or_abort(self):
        rng, engine = self.rng, self.llm.engine
        self.row["operations"] += 1
        if len(self.running) < 16 and rng.random() < 0.15:
            number, name = rng.randrange(len(self.prompts)), f"r{self.row['requests']}"
            heat = rng.choice([0.0, 0.0, 1.0])
            params = SamplingParams(
                n=rng.choice([1, 1, 1, 3]) if heat else 1,
                temperature=heat,
                ignore_eos=True,
                seed=rng.choice([None, 1]),
                max_tokens=rng.choice([1, 20, 90, 90]),
                frequency_penalty=rng.choice([0.0] * 9 + [0.5]) if heat else 0.0,
            )
            engine.add_request(name, self.prompts[number], params)
            self.running[name] = None if heat else number
            self.row["requests"] += 1
        elif self.running and rng.random() < 0.01:
            name = rng.choice(sorted(self.running))
            engine.abort(name)
            del self.running[name]
            self.row["aborted"] += 1
        elif rng.random() < 0.002:
            self.llm.cache.reset_prefix_cache()

    def step(self):
        engine = self.llm.engine
        if not engine.has_unfinished():
            return
        for output in engine.step():
            if output.finished:
                self._end(output, self.running.pop(output.request_id))
        self.row["steps"] += 1
        if self.row["steps"] % CHECK_EVERY == 0:
            self._check()

    def _end(self, output, number):
        self.row["finished"] += 1
        if output.error is not None or any(c.finish_reason != "length" for c in output.outputs):
            self.row["failed"] += 1
            self.examples.append(f"{output.request_id} failed: {output.error}")
        elif number is not None:
            token_ids = output.outputs[0].token_ids
            before = self.said.setdefault(number, token_ids)
            common = min(len(before), len(token_ids))
            self.row["compared"] += before is not token_ids
            if before[:common] != token_ids[:common]:
                self.row["differing"] += 1
                self.examples.append(f"prompt {number}: {before} and then {token_ids}")
            if len(token_ids) > len(before):
                self.said[number] = token_ids

    def _check(self):
        try:
            self.llm.cache.check_integrity()
        except PoolError as error:
            self.row["integrity"] += 1
            self.examples.append(str(error))

    def finish(self):
        self.row["lost"] += len(self.running)
        self._check()
        self.llm.cache.reset_prefix_cache()
        stats = self.llm.stats()
        names = ("num_sequences", "pages_in_use", "exact_pages_in_use", "pages_cached")
        if any(stats[name] for name in names):
            self.row["integrity"] += 1
            self.examples.append(f"nothing runs, but {[(n, stats[n]) for n in names]}")
