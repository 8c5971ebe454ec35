"""Checks that an embedder's loop around `SpectralKVCache` uses the cache correctly.

An embedder writes an adapter of four methods around the loop and runs the checks, say in pytest:

```python
kit = Conformance(make_adapter)          # make_adapter(AdapterConfig) -> Adapter

@pytest.mark.parametrize("check", Conformance.CHECKS)
def test_my_loop(check):
    getattr(kit, check)()                # raises ConformanceError, or returns Evidence
```

Every check serves greedy requests over one small random model and compares tokens with those of
transformers, of this package's own engine, or of the same loop under other conditions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Unpack

import torch

from spectral_paged.conformance.adapter import (
    Adapter,
    AdapterConfig,
    Evidence,
    FilledPool,
    NaNInjector,
    RequestDriver,
    Result,
)
from spectral_paged.conformance.small_llama import random_prompts, small_llama
from spectral_paged.errors import ConformanceError
from spectral_paged.llm import LLM
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.options import CacheOptions, CacheOptionsDict
from spectral_paged.pages import PageFormat
from spectral_paged.sampling import SamplingParams

NUM_TOKENS = 8  # tokens that a request generates
GROWN_TOKENS = 80  # tokens of a request that outgrows the pool
AROUND_PAGES = (1, 2, 63, 64, 65, 127, 128, 129)
AROUND_BLOCKS = (511, 512, 513, 575, 576, 577, 632, 639, 640, 641)  # one page is visible from 640
SEALED = (700, 1087, 1088, 1147, 1152, 1153, 1217)  # two pages are visible from 1152


@dataclass
class Conformance:
    """The checks, each of which raises `ConformanceError` with the difference and its likely cause.

    Args:
        make: builds a new adapter; called many times.
        model: a transformers causal LM in fp32 without an end of sequence; default `small_llama()`.
    """

    make: Callable[[AdapterConfig], Adapter]
    model: Any = field(default_factory=small_llama)

    CHECKS: ClassVar[tuple[str, ...]] = (
        "exact_tokens_are_those_of_transformers",
        "sealed_tokens_are_those_of_the_engine",
        "batch_mates_change_nothing",
        "chunk_sizes_change_nothing",
        "preemption_changes_nothing",
        "prefix_hits_change_nothing",
        "store_hits_change_nothing",
        "released_sequences_leave_nothing",
        "nan_fails_its_own_sequence",
    )

    def __post_init__(self) -> None:
        self._geometry = ModelGeometry.from_config(self.model.config)
        heads = self._geometry.num_kv_heads, self._geometry.head_dim
        self.exact = PageFormat("exact", *heads, prefill_segment=512)
        # pages far from exact, so that seeing a page too early or too late changes tokens
        bands = ((16, 2),)
        self.coarse = PageFormat("coarse", *heads, bands, bands, rope="frame", prefill_segment=512)
        self._alone: dict[tuple[int, ...], list[int]] = {}

    def run(self) -> dict[str, Evidence]:
        """Run every check and return the evidence of each."""
        return {check: getattr(self, check)() for check in self.CHECKS}

    # ---- the checks ------------------------------------------------------------------------

    def exact_tokens_are_those_of_transformers(self) -> Evidence:
        """The `exact` format gives the model's own greedy tokens, around pages and blocks."""
        prompts = self._prompts(AROUND_PAGES + AROUND_BLOCKS)
        found, evidence = self._serve(self._config(self.exact), prompts)
        for prompt, tokens in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt], device=self.model.device)
            want = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
            )
            self._compare(
                prompt,
                tokens,
                want[0, len(prompt) :].tolist(),
                "transformers' own generate gives",
                "positions (PlanEntry.start and on), RoPE before attend, the row of the logits",
            )
        return evidence

    def sealed_tokens_are_those_of_the_engine(self) -> Evidence:
        """With pages, tokens are the engine's, around the lengths where a page becomes visible."""
        prompts = self._prompts(AROUND_BLOCKS + SEALED)
        llm = LLM.from_model(
            copy.deepcopy(self.model),  # its attention is replaced
            kv_format=self.coarse,
            kv_cache_bytes=self._config().cache_options.kv_cache_bytes,
        )
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found, evidence = self._serve(self._config(), prompts)
        for prompt, tokens, output in zip(prompts, found, outputs, strict=True):
            self._compare(
                prompt,
                tokens,
                output.outputs[0].token_ids,
                "this package's engine gives",
                "num_prompt_tokens (the prompt's, also after a resume), positions, end_step",
            )
        if not evidence.pages_attended:
            raise ConformanceError("no page was attended: does every step go through this cache?")
        return evidence

    def batch_mates_change_nothing(self) -> Evidence:
        """Requests that arrive one a step and run together give the tokens of separate runs."""
        prompts = self._prompts((64, 513, 640, 700, 1152, 3))
        found, evidence = self._serve(self._config(), prompts, stagger=True)
        self._compare_alone(prompts, found, "the order of q, k and v: that of plan.entries")
        return evidence

    def chunk_sizes_change_nothing(self) -> Evidence:
        """Steps of 48 tokens and of 1,000 give the same tokens."""
        prompts, evidence = self._prompts((65, 577, 700, 1153)), Evidence()
        for budget in (48, 1000):
            found, seen = self._serve(self._config(max_step_tokens=budget), prompts)
            self._compare_alone(prompts, found, f"chunks (max_step_tokens {budget}), chunk_limit")
            evidence += seen
        return evidence

    def preemption_changes_nothing(self) -> Evidence:
        """Tokens stay the same if another holder takes all free memory while requests decode."""
        prompts, evidence = self._prompts((600, 577, 63, 590, 620, 640)), Evidence()
        for format in (self.coarse, self.exact):
            for caching in (False, True):
                config = self._config(
                    format,
                    kv_cache_bytes=self._bytes(5000),
                    max_num_seqs=64,
                    enable_prefix_caching=caching,
                )
                driver = RequestDriver(self.make(config), GROWN_TOKENS)
                handles = [driver.start(prompt) for prompt in prompts]
                while driver.num_made(handles[-1]) < GROWN_TOKENS // 2:
                    driver.step()
                with FilledPool(driver.adapter.cache) as filled:
                    while driver.evidence.preemptions == 0:
                        filled.take()  # again, because a seal frees more than it takes
                        if not driver.step():
                            break
                    found = driver.finish()
                driver.check_empty()
                self._compare_alone(
                    prompts,
                    found,
                    "that a resumed sequence has all its tokens and still the "
                    "num_prompt_tokens that it began with",
                    format=format,
                    num_tokens=GROWN_TOKENS,
                )
                evidence += driver.evidence
        return evidence

    def prefix_hits_change_nothing(self) -> Evidence:
        """Prompts that share prefixes with earlier ones give the tokens of separate runs."""
        first = self._prompts((1200, 700))
        again = [p[:n] + p[:9] for p in first for n in (640, 576, len(p) - 1)] + first
        driver = RequestDriver(self.make(self._config()), NUM_TOKENS)
        for wave in (first, again):
            for prompt in wave:
                driver.start(prompt)
            found = driver.finish()
        driver.check_empty()
        self._compare_alone(
            first + again, found, "token_ids given to add_sequence, and where num_tokens goes on"
        )
        return driver.evidence

    def store_hits_change_nothing(self) -> Evidence:
        """Prompts that come back from host memory give the tokens of separate runs; in a loop that
        never calls `prefetch` none comes back, as the evidence shows."""
        first = self._prompts((1200, 1700))
        again = [prompt + prompt[:9] for prompt in first] + first
        config = self._config(kv_host_memory=self._bytes(20_000))
        driver = RequestDriver(self.make(config), NUM_TOKENS)
        for wave in (first, again):
            for prompt in wave:
                driver.start(prompt)
            found = driver.finish()
            driver.adapter.cache.reset_prefix_cache()  # host memory keeps what it has
        driver.check_empty()
        driver.adapter.cache.close()
        self._compare_alone(
            first + again, found, "that prefetch and add_sequence get the same token_ids and salt"
        )
        return driver.evidence

    def released_sequences_leave_nothing(self) -> Evidence:
        """Requests released while waiting, in prefill or in decode leave the cache empty."""
        adapter = self.make(self._config(max_num_seqs=3, max_step_tokens=64))
        driver = RequestDriver(adapter, NUM_TOKENS)
        handles = [driver.start(p) for p in self._prompts((700, 30, 90, 65))]
        driver.step()
        driver.release(handles[3])
        for _ in range(4):
            driver.step()
        for handle in handles[:3]:
            driver.release(handle)
        for _ in range(4):  # released requests must return no tokens
            driver.step()
        driver.check_empty()
        return driver.evidence

    def nan_fails_its_own_sequence(self) -> Evidence:
        """NaN in a key of a prompt fails its sequence only, whose tokens are never prefix hits."""
        prompts = self._prompts((700, 640, 90))
        driver = RequestDriver(self.make(self._config()), NUM_TOKENS)
        spoiled = NaNInjector(position=100)
        with driver.adapter.cache.observe(spoiled):
            spoiled.victim = driver.start(prompts[0])
            for prompt in prompts[1:]:
                driver.start(prompt)
            found = driver.finish()
        if not spoiled.done:
            raise ConformanceError(
                "no NaN could be placed: the loop does not call adapter.cache.attend"
            )
        if not isinstance(found[0], Exception):
            raise ConformanceError(
                f"a sequence with NaN in a key gave tokens {list(found[0])}: hand on what "
                "end_step().failed and settle().failed name, and check logits with isfinite"
            )
        self._compare_alone(prompts[1:], found[1:], "what a failing sequence takes with it")
        driver.start(prompts[0])
        again = driver.finish()[-1:]
        self._compare_alone(prompts[:1], again, "free(seq_id, forget=True) of what has failed")
        driver.check_empty()
        return driver.evidence

    # ---- running them ----------------------------------------------------------------------

    def _prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        return random_prompts(lengths, vocab_size=self._geometry.vocab_size)

    def _bytes(self, num_tokens: int) -> int:
        """Return the bytes of `num_tokens` exact tokens."""
        g = self._geometry
        return num_tokens * g.num_layers * g.num_kv_heads * g.head_dim * 2 * 4

    def _config(
        self,
        format: PageFormat | None = None,
        *,
        max_step_tokens: int = 512,
        **changes: Unpack[CacheOptionsDict],
    ) -> AdapterConfig:
        """Return an adapter's config; `changes` are cache options that must not change tokens."""
        roomy = CacheOptions(
            kv_cache_bytes=self._bytes(20_000),
            max_num_seqs=16,
            max_model_len=2048,
            debug_poison=True,
        )
        return AdapterConfig(
            self.model, format or self.coarse, replace(roomy, **changes), max_step_tokens
        )

    def _serve(
        self,
        config: AdapterConfig,
        prompts: list[list[int]],
        *,
        stagger: bool = False,
        num_tokens: int = NUM_TOKENS,
    ) -> tuple[list[Result], Evidence]:
        """Serve the prompts through a new adapter, whose cache must end empty.

        stagger: one prompt arrives a step.
        """
        driver = RequestDriver(self.make(config), num_tokens)
        for prompt in prompts:
            driver.start(prompt)
            if stagger:
                driver.step()
        found = driver.finish()
        driver.check_empty()
        return found, driver.evidence

    def _compare_alone(
        self,
        prompts: list[list[int]],
        found: Sequence[Result],
        where: str,
        *,
        format: PageFormat | None = None,
        num_tokens: int = NUM_TOKENS,
    ) -> None:
        """Compare with each prompt served separately, in large steps and without prefix caching."""
        format = format or self.coarse
        config = self._config(format, max_step_tokens=512, enable_prefix_caching=False)
        for prompt, tokens in zip(prompts, found, strict=True):
            key = (int(format.seals), num_tokens, *prompt)
            if key not in self._alone:
                (alone,), _ = self._serve(config, [prompt], num_tokens=num_tokens)
                if isinstance(alone, Exception):
                    raise ConformanceError(f"a prompt of {len(prompt)} tokens fails: {alone!r}")
                self._alone[key] = list(alone)
            self._compare(prompt, tokens, self._alone[key], "served alone it gives", where)

    @staticmethod
    def _compare(
        prompt: list[int], found: Result, want: Sequence[int], who: str, where: str
    ) -> None:
        if isinstance(found, Exception):
            raise ConformanceError(f"a prompt of {len(prompt)} tokens failed: {found!r}") from found
        if list(found) != list(want):
            pairs = enumerate(zip(found, want, strict=True))
            first = next(i for i, (a, b) in pairs if a != b)
            raise ConformanceError(
                f"a prompt of {len(prompt)} tokens: token {first} of its output is "
                f"{found[first]}, {who} {want[first]}; check {where}"
            )
