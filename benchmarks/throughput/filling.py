"""Contexts without their prefill: K and V are stored and sealed as prompts would be, but made up.

Long contexts can so be decoded without paying for hours of prefill; what is timed is the decode
phase alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_paged.cache import SpectralKVCache, StepPlan
from spectral_paged.conformance.inputs import MadeUpTokens, structured_blocks
from spectral_paged.engine import Engine, Runner
from spectral_paged.kernels.page.view import put_units
from spectral_paged.pages import encode_pages
from spectral_paged.sampling import PendingTokens

FILL_TOKENS = 65_536  # of a step that only stores


class CopyingEncoder:
    """Writes one page, encoded once, wherever a block is sealed: for formats that no kernel seals,
    whose encoding would take hours at the size of a benchmark. Pages of their own places, so
    reading them costs what it costs."""

    backend = "copy"

    def __init__(self, cache: SpectralKVCache) -> None:
        k, v = structured_blocks(1, cache.format, cache.device)
        bound = cache.sealer.basis.bound
        self._heads = cache.format.num_kv_heads
        self._page = encode_pages(k, v, cache.format, basis=bound, layers=[0])

    def warm_up(self, planes: Tensor) -> None:
        pass

    def seal(self, planes: Tensor, exact: Tensor, pages: Tensor, first: Tensor) -> Tensor:
        put_units(planes, pages, self._page.expand(len(planes), len(pages), -1))
        shape = len(pages), len(planes), self._heads, 2
        return torch.zeros(shape, dtype=torch.int32, device=planes.device)


def fill_instead_of_prefill(engine: Engine, vocab_size: int) -> None:
    """Let an engine's prompts be stored and sealed, and its decode steps run."""
    cache = engine.cache
    engine.runner = FillingRunner(engine.runner, cache, vocab_size)
    for group, encoder in cache.sealer.encoders.items():
        if encoder.backend == "torch":
            cache.sealer.encoders[group] = CopyingEncoder(cache)
    scheduler = engine.scheduler
    scheduler.config = replace(scheduler.config, max_num_batched_tokens=FILL_TOKENS)


class FillingRunner:
    """Runs decode steps by `runner`; other steps store made-up K and V and the model is left out.

    Sequences of a step that mixes both get made-up tokens, so no text of such a run means anything.
    """

    def __init__(self, runner: Runner, cache: SpectralKVCache, vocab_size: int) -> None:
        self.runner = runner
        self.cache = cache
        self.vocab_size = vocab_size
        self._tokens = MadeUpTokens(cache)

    def forward(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
        pending: PendingTokens | None = None,
    ) -> Tensor:
        if plan.is_decode:
            return self.runner.forward(plan, token_ids, logit_rows, pending)
        self._tokens.append(plan.num_tokens)
        return torch.zeros(len(logit_rows), self.vocab_size, device=self.cache.device)

    def stats(self) -> dict[str, Any]:
        return self.runner.stats()
