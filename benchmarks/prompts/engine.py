"""Prompt tokens a second of the engine, by format, prompt length and budget of a step.

Every request ends with its first token, so that a run is prompts alone, seals included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from spectral_paged.benchmarks.throughput.backends import engine_of, forget
from spectral_paged.llm import LLM
from spectral_paged.models.loader import LoadedModel
from spectral_paged.sampling import SamplingParams

FORMATS = ("exact", "spectral-quality")
SEGMENTS = (2_048,)
INPUT_LENS = (8_192, 32_768)
BUDGETS = (2_048, 8_192, 16_384)
TOKENS = 65_536  # of all prompts of a run, unless their number is given


@dataclass(frozen=True, slots=True)
class EngineRow:
    """The rate of one run.

    segment: `prefill_segment`; 0 for formats that seal nothing and have none.
    budget: `max_num_batched_tokens`.
    seal_seconds: how long the device sealed.
    """

    format: str
    input_len: int
    num_prompts: int
    segment: int
    budget: int
    tokens_per_second: float
    seconds: float
    seal_seconds: float
    prefill_backend: str


def _prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, vocab_size, (count, length), generator=generator).tolist()


def _seconds(llm: LLM, prompts: Sequence[list[int]]) -> float:
    """Seconds from the first request until every one has its only token.

    Raises:
        SpectralPagedError: a request failed.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    while llm.engine.has_unfinished():
        for output in llm.engine.step():
            if output.error is not None:
                raise output.error
    return time.perf_counter() - begin


def measure(
    loaded: LoadedModel,
    *,
    formats: Sequence[str],
    segments: Sequence[int],
    input_lens: Sequence[int],
    budgets: Sequence[int],
    num_prompts: int | None,
    enforce_eager: bool,
) -> Iterator[EngineRow]:
    """Time prompts in one engine for each format, segment and budget; the first run of each is not
    counted.

    Raises:
        SpectralPagedError: a request failed.
    """
    geometry = loaded.geometry
    counts = {n: num_prompts or max(2, TOKENS // n) for n in input_lens}
    token = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim
    most = max(count * (n + 1024) for n, count in counts.items())  # exact, with room for tables
    for format in formats:
        kinds = segments if format != "exact" else (0,)
        for segment, budget in product(kinds, budgets):
            forget(loaded.model.device)
            options = {
                "device": str(loaded.model.device),
                "kv_cache_bytes": int(1.1 * most * token * loaded.model.dtype.itemsize)
                + (32 << 20),
                "max_num_seqs": max(counts.values()),
                "max_model_len": max(input_lens) + 1,
                "max_num_batched_tokens": budget,
                **({"prefill_segment": segment} if segment else {}),
                "enable_prefix_caching": False,
                "enforce_eager": enforce_eager,
            }
            with engine_of(loaded, format, options) as llm:
                llm.cache.warm_up()
                _seconds(llm, _prompts(2, min(input_lens), geometry.vocab_size))
                for length, count in counts.items():
                    prompts = _prompts(count, length, geometry.vocab_size)
                    sealing = _sealed(llm)
                    seconds = _seconds(llm, prompts)
                    yield EngineRow(
                        format,
                        length,
                        count,
                        segment,
                        budget,
                        count * length / seconds,
                        seconds,
                        _sealed(llm) - sealing,
                        str(llm.stats()["prefill_backend"]),
                    )


def _sealed(llm: LLM) -> float:
    return float(str(llm.stats()["seal_seconds"]))
