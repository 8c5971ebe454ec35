"""Engines of `bench store`: with a store and without, warmed up and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectral_paged.benchmarks.store.answers import Answer, ask, check_equal, random_tokens
from spectral_paged.benchmarks.store.sizes import Sizes
from spectral_paged.benchmarks.throughput.backends import engine_of, forget, warm_up
from spectral_paged.benchmarks.throughput.workload import Job
from spectral_paged.llm import LLM
from spectral_paged.models.loader import LoadedModel

CHECKED = 2  # prompts that are compared before anything is timed


@dataclass(slots=True)
class Bench:
    """A model, the sizes of a suite, and a folder for stores.

    checked: answers of prompts that were computed, by length, to compare others with.
    ties: answers that part at a tie.
    """

    loaded: LoadedModel
    kv_format: str
    sizes: Sizes
    folder: Path
    checked: dict[int, list[Answer]] = field(default_factory=dict)
    ties: int = 0

    def tokens(self, seed: int, length: int) -> list[int]:
        return random_tokens(seed, length, self.loaded.geometry.vocab_size)

    @property
    def token_bytes(self) -> int:
        """The bytes of a token's K and V in the model's dtype."""
        geometry, itemsize = self.loaded.geometry, self.loaded.model.dtype.itemsize
        return 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * itemsize

    @contextmanager
    def engine(
        self, jobs: list[Job], *, seats: int, cache_bytes: int, store: dict[str, Any]
    ) -> Iterator[LLM]:
        """An engine that is warm for `jobs`.

        Args:
            store: `kv_host_memory`, `kv_store`, or nothing.
        """
        sizes = self.sizes
        longest = max(len(job.prompt_token_ids) + job.output_len for job in jobs)
        options = {
            "device": str(self.loaded.model.device),
            "kv_cache_bytes": cache_bytes,
            "max_num_seqs": seats,
            "max_model_len": longest + 1,
            "max_num_batched_tokens": sizes.max_num_batched_tokens,
            "prefill_segment": sizes.prefill_segment,
            **store,
        }
        if "kv_store" in store:
            options |= {"kv_store_size": sizes.disk_bytes, "model_fingerprint": sizes.model}
        forget(self.loaded.model.device)
        with engine_of(self.loaded, self.kv_format, options) as llm:
            warm_up(llm, jobs[:seats])
            yield llm

    def check(self, llm: LLM, length: int, *, stored: bool) -> None:
        """Compare what prompts of `length` tokens get where they are computed and, with a store,
        where they came back from it.

        Raises:
            ArithmeticError: the answers differ, or nothing came back.
        """
        prompts = [self.tokens(-1 - i, length) for i in range(CHECKED)]
        known = self.checked.setdefault(length, [])
        for i, prompt in enumerate(prompts):
            llm.cache.reset_prefix_cache()
            cold = ask(llm, prompt)
            if len(known) == i:
                known.append(cold)
            self.compare(known[i], cold, f"prompt {i} of {length} tokens, computed again")
        for i, prompt in enumerate(prompts if stored else []):
            llm.cache.reset_prefix_cache()
            warm = ask(llm, prompt)
            if not warm.cached["host"] + warm.cached["disk"]:
                raise ArithmeticError(f"a prompt of {length} tokens did not come back; not timed")
            self.compare(known[i], warm, f"prompt {i} of {length} tokens, from the store")
        llm.cache.reset_prefix_cache()

    def compare(self, cold: Answer, warm: Answer, what: str) -> None:
        """Compare two answers, and count those that part at a tie; raises as `check_equal`."""
        self.ties += not check_equal(cold, warm, what)
