"""The rows of a batch of logits: how each of them is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from spectral_paged.device import upload
from spectral_paged.sampling.params import SamplingParams
from spectral_paged.sampling.rules import GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of a batch of logits: its parameters, and as much of the past as they need.

    num_output_tokens: tokens sampled before, known on the host or not.
    blocked_token_ids: tokens that are not allowed now.
    penalty_row: the row of `Penalties` that counts its tokens; -1 without penalties.
    rule_row: the row of `TokenRules` that has its rules; -1 without them.
    process: changes the row's logits, `[vocab]`, before anything else does.
    allowed: a bit for each token that is allowed now, in int32 words; None allows all.
    drafted: the last of the tokens before it, which are a draft that no table has counted.
    """

    params: SamplingParams
    seed: int
    num_output_tokens: int = 0
    blocked_token_ids: Sequence[int] = ()
    penalty_row: int = -1
    rule_row: int = -1
    allowed: np.ndarray[Any, Any] | None = None
    process: Callable[[Tensor], Tensor] | None = None
    drafted: Sequence[int] = ()


class DrawColumns(NamedTuple):
    """The parameters of rows that draw, on the device, `[N]` each; None filters nothing."""

    places: Tensor
    temperature: Tensor
    seeds: Tensor
    num_output_tokens: Tensor
    min_p: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None


class SampleBatch(Sequence[SampleRow]):
    """The rows of a batch, and what follows from them however many tokens they sample.

    While the same rows go on, `later` batches of theirs share what is on the device.

    Args:
        rows: the rows, in the order of the logits.
        device: where the logits are.

    Attributes:
        rows: as they were given.
        penalised, ruled, masked, processed: the rows that have a row of `Penalties`, of
            `TokenRules`, a mask, or a function.
        drawn: the rows that are not greedy.
        drafted: the rows behind a draft.
        wanted: the log-probabilities that each row returns.
        blocked: `(row, token)` of each token that is not allowed now.
        num_more: tokens that each row has sampled since.
    """

    def __init__(self, rows: Sequence[SampleRow], device: torch.device) -> None:
        self.rows, self.num_more = list(rows), 0
        self._device = device
        changing = [i for i, row in enumerate(rows) if row.params.changes_logits]
        self.penalised = [i for i in changing if rows[i].penalty_row >= 0]
        self.ruled = [i for i in changing if rows[i].rule_row >= 0]
        self.masked = [i for i in changing if rows[i].allowed is not None]
        self.processed = [i for i in changing if rows[i].process is not None]
        self.drawn = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
        self.drafted = [i for i, row in enumerate(rows) if row.drafted]
        self._reads_output = any(rows[i].params.reads_output for i in changing)
        self.wanted = [row.params.wanted for row in rows]
        self.blocked = [(i, token) for i, row in enumerate(rows) for token in row.blocked_token_ids]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> SampleRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[SampleRow]: ...
    def __getitem__(self, index: int | slice) -> SampleRow | list[SampleRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        return replace(row, num_output_tokens=row.num_output_tokens + self.num_more)

    def later(self, num_more: int) -> SampleBatch:
        """The same rows, once each has sampled `num_more` tokens more than `rows` say."""
        found = SampleBatch.__new__(SampleBatch)
        found.__dict__ = {**self.__dict__, "num_more": num_more}
        return found

    @property
    def may_go_on(self) -> bool:
        """True if the next tokens of the rows are sampled as these are."""
        return not (self.blocked or self._reads_output or self.drafted)

    @cached_property
    def draws(self) -> DrawColumns:
        """The parameters of `drawn`, and the number of tokens that `rows` say."""
        rows, device = [self.rows[i] for i in self.drawn], self._device
        params = [row.params for row in rows]
        filters = any(p.top_k > 0 or p.top_p < 1 for p in params)
        none = np.iinfo(np.int64).max  # as many tokens as there are
        return DrawColumns(
            upload(self.drawn, torch.long, device),
            upload([p.temperature for p in params], torch.float32, device),
            upload([row.seed for row in rows], torch.int64, device),
            upload([row.num_output_tokens for row in rows], torch.int64, device),
            upload([p.min_p for p in params], torch.float32, device)
            if any(p.min_p > 0 for p in params)
            else None,
            upload([p.top_k if p.top_k > 0 else none for p in params], torch.int64, device)
            if filters
            else None,
            upload([p.top_p for p in params], torch.float32, device) if filters else None,
        )
