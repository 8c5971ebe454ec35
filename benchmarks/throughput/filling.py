"""Contexts without their prefill: made-up K and V, stored and sealed as a prompt's would be.

A benchmark of the decode phase reaches long contexts this way without hours of prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_paged.cache import Encoder, SpectralKVCache, StepPlan, replace_encoders
from spectral_paged.conformance.inputs import MadeUpTokens
from spectral_paged.engine import Engine, Runner
from spectral_paged.kernels.page.view import gather_units, put_units
from spectral_paged.sampling import LogitsVisitor, PendingTokens

FILL_TOKENS = 65_536  # most tokens of a step that only stores


class CopyingEncoder:
    """An encoder that writes a copy of the first page of `encoder` for every block.

    It serves formats that no kernel seals, whose encoding would take hours at the size of a
    benchmark. Each block has a page in its own slot, so reads cost as much as of real pages."""

    backend = "copy"

    def __init__(self, encoder: Encoder, page_bytes: int) -> None:
        self._encoder, self._page_bytes = encoder, page_bytes
        self._made: tuple[Tensor, Tensor] | None = None  # pages [L, 1, bytes], and their `bad`

    def warm_up(self, planes: Tensor) -> None:
        self._encoder.warm_up(planes)

    def seal(self, planes: Tensor, exact: Tensor, pages: Tensor, first: Tensor) -> Tensor:
        if self._made is None:
            bad = self._encoder.seal(planes, exact[:1], pages[:1], first[:1])
            found = [gather_units(plane, pages[:1], self._page_bytes) for plane in planes]
            self._made = torch.stack(found), bad
        page, bad = self._made
        put_units(planes, pages, page.expand(-1, len(pages), -1))
        return bad.expand(len(pages), -1, -1, -1).contiguous()


def copy_where_no_kernel_seals(cache: SpectralKVCache) -> None:
    """Make a cache whose blocks no kernel seals copy its first page (`CopyingEncoder`)."""
    page_bytes = cache.format.page_bytes
    replace_encoders(cache, lambda e: e if e.backend == "triton" else CopyingEncoder(e, page_bytes))


def fill_instead_of_prefill(engine: Engine, vocab_size: int) -> None:
    """Make an engine store made-up K and V for prompts and compute its decode steps only."""
    cache = engine.cache
    engine.runner = FillingRunner(engine.runner, cache, vocab_size)
    copy_where_no_kernel_seals(cache)
    scheduler = engine.scheduler
    scheduler.config = replace(scheduler.config, max_num_batched_tokens=FILL_TOKENS)


class FillingRunner:
    """A runner that passes decode steps to `runner` and stores made-up K and V in all others.

    Sequences that decode in a mixed step get made-up tokens, so the text of a run means nothing.
    """

    def __init__(self, runner: Runner, cache: SpectralKVCache, vocab_size: int) -> None:
        self.runner = runner
        self.cache = cache
        self.vocab_size = vocab_size
        self._tokens = MadeUpTokens(cache)

    def sleep(self) -> None:
        self.runner.sleep()

    def wake_up(self) -> None:
        self.runner.wake_up()

    def forward(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
        pending: PendingTokens | None = None,
        visitor: LogitsVisitor | None = None,
        adapters: Sequence[int] | None = None,
    ) -> Tensor:
        if plan.is_decode:
            return self.runner.forward(plan, token_ids, logit_rows, pending, visitor, adapters)
        assert visitor is None, "made-up tokens have no log-probabilities"
        self._tokens.append(plan.num_tokens)
        return torch.zeros(len(logit_rows), self.vocab_size, device=self.cache.device)

    def stats(self) -> dict[str, Any]:
        return self.runner.stats()
