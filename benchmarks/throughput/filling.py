"""Contexts without their prefill: K and V are stored and sealed as prompts would be, but made up.

Long contexts can so be decoded without paying for hours of prefill; what is timed is the decode
phase alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_paged.benchmarks.blocks import structured_blocks
from spectral_paged.cache import SpectralKVCache
from spectral_paged.engine import Runner
from spectral_paged.step import PendingTokens, StepPlan


class FillingRunner:
    """Runs decode steps by `runner`; other steps store made-up K and V and the model is left out.

    Sequences of a step that mixes both get made-up tokens, so no text of such a run means anything.
    """

    def __init__(self, runner: Runner, cache: SpectralKVCache, vocab_size: int) -> None:
        self.runner = runner
        self.cache = cache
        self.vocab_size = vocab_size
        k, v = structured_blocks(4, cache.format, cache.device)
        # [tokens, H, D], long enough for any step and other for every head
        self._k, self._v = (x.transpose(1, 2).flatten(0, 1).to(cache.dtype) for x in (k, v))

    def forward(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
        pending: PendingTokens | None = None,
    ) -> Tensor:
        if plan.is_decode:
            return self.runner.forward(plan, token_ids, logit_rows, pending)
        count = plan.num_tokens
        rows = torch.arange(count, device=self.cache.device) % len(self._k)
        for layer in range(self.cache.num_layers):
            self.cache.append(layer, self._k[rows], self._v[rows])
        return torch.zeros(len(logit_rows), self.vocab_size, device=self.cache.device)

    def stats(self) -> dict[str, Any]:
        return self.runner.stats()
