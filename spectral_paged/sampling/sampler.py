"""The vectorised sampler runs where the logits are and fetches its results once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_paged.device import upload
from spectral_paged.sampling.logprobs import TokenLogprobs
from spectral_paged.sampling.sample_batch import DrawColumns, SampleBatch, SampleRow
from spectral_paged.sampling.state import SamplingState


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Input tokens that the device has sampled and the host has not seen.

    ids: int64 `[N]` on the device.
    sources: the index into `ids` for each place in the flat batch; -1 for a token that is known.
    """

    ids: Tensor
    sources: Sequence[int] | np.ndarray[Any, Any]


def uniform_noise(seeds: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Counter-based noise in (0, 1), fp32 `[N, vocab_size]`: a function of seed, step and token.

    SplitMix64's finaliser (Steele, Lea, Flood 2014) runs over a counter. Without state, a row's
    noise depends on nothing else in the batch and survives a preemption (decision 0008).
    """
    x = seeds.unsqueeze(-1) * -7046029254386353131 + steps.unsqueeze(-1) * -4658895280553007687
    x = x + torch.arange(vocab_size, device=seeds.device) * -7723592293110705685
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    x = x ^ _shift(x, 31)
    return (_shift(x, 41).float() + 0.5) / float(1 << 23)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class SampledTokens(TokenLogprobs):
    """Tokens of a batch, sampled on the device from logits `[N, vocab]`, with log-probabilities.

    The order is vLLM's: log-probabilities of the raw logits, then biases, allowed tokens and bad
    words, then penalties, then temperature, then min-p, top-k and top-p, then a draw by the Gumbel
    maximum. `get` copies the results to the host.

    Args:
        rows: those of the logits; a `SampleBatch` that goes on uploads nothing.
        state: the tables of rows with a `penalty_row` or a `rule_row`. `count` adds the sampled
            tokens to them.

    Attributes:
        ids: int64 `[N]` on the device, where the next step reads them.
    """

    def __init__(
        self,
        logits: Tensor,
        rows: Sequence[SampleRow],
        state: SamplingState | None = None,
    ) -> None:
        logits = logits.float()
        batch = rows if isinstance(rows, SampleBatch) else SampleBatch(rows, logits.device)
        self.batch = batch
        self._state = state or SamplingState()
        adjusted = self._adjusted(logits)
        self.ids = _choose(adjusted, batch)
        empty = None
        if batch.ruled or batch.masked or batch.processed:
            empty = ~(adjusted.amax(dim=-1, keepdim=True) > float("-inf"))  # NaN is no better
        super().__init__(logits, self.ids, batch.wanted, empty)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """`logits` under rules, after penalties and with blocked tokens at -inf; a copy if there
        are any."""
        batch = self.batch
        rows = batch.rows
        changes = batch.blocked or batch.penalised or batch.ruled or batch.masked
        if not (changes or batch.processed):
            return logits
        logits = logits.clone()
        for i in batch.processed:
            process = rows[i].process
            assert process is not None
            logits[i] = process(logits[i].clone())
        if batch.masked:
            places = upload(batch.masked, torch.long, logits.device)
            words = upload(
                np.stack([row.allowed for row in rows if row.allowed is not None]),
                torch.int32,
                logits.device,
            )
            logits[places] = _masked(logits[places], words)
        if batch.ruled:
            places = upload(batch.ruled, torch.long, logits.device)
            logits[places] = self._state.token_rules.apply(
                logits[places],
                [rows[i].rule_row for i in batch.ruled],
                [rows[i].drafted for i in batch.ruled] if batch.drafted else (),
            )
        if batch.penalised:
            held = [rows[i] for i in batch.penalised]
            places = upload(batch.penalised, torch.long, logits.device)
            logits[places] = self._state.penalties.apply(
                logits[places],
                [row.penalty_row for row in held],
                [row.params for row in held],
                [row.drafted for row in held] if batch.drafted else (),
            )
        if batch.blocked:
            row, token = upload(batch.blocked, torch.long, logits.device).T
            least = logits.new_full((), float("-inf"))  # a number would be uploaded and waited for
            logits[row, token] = least
        return logits

    def count(self, times: int = 1) -> None:
        """Count the tokens in the tables of their rows; -1 times takes them back.

        Tokens of rows behind a draft are not counted, because they may not be the request's.
        """
        batch = self.batch
        penalised, ruled = batch.penalised, batch.ruled
        if batch.drafted:
            penalised = [i for i in penalised if not batch.rows[i].drafted]
            ruled = [i for i in ruled if not batch.rows[i].drafted]
        if penalised:
            rows = [batch.rows[i].penalty_row for i in penalised]
            ids = self.ids[upload(penalised, torch.long, self.ids.device)]
            self._state.penalties.count(rows, ids, times)
        if ruled:
            rows = [batch.rows[i].rule_row for i in ruled]
            ids = self.ids[upload(ruled, torch.long, self.ids.device)]
            self._state.token_rules.count(rows, ids, times)


def _masked(logits: Tensor, words: Tensor) -> Tensor:
    """`logits` `[N, vocab]` with -inf where the bits of `words`, int32 `[N, W]`, are 0."""
    bits = words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)
    forbidden = (bits & 1).flatten(1)[:, : logits.shape[-1]] == 0
    return logits.masked_fill(forbidden, float("-inf"))


def _choose(logits: Tensor, batch: SampleBatch) -> Tensor:
    greedy = logits.argmax(dim=-1)
    if not batch.drawn:
        return greedy
    draws = batch.draws
    hot = _filter(logits[draws.places] / draws.temperature.unsqueeze(-1), draws)
    steps = draws.num_output_tokens + batch.num_more
    gumbel = -torch.log(-torch.log(uniform_noise(draws.seeds, steps, hot.shape[-1])))
    return greedy.index_copy(0, draws.places, (hot + gumbel).argmax(dim=-1))


def _filter(logits: Tensor, draws: DrawColumns) -> Tensor:
    """`logits` with the tokens that min-p, top-k and top-p leave out set to -inf."""
    if draws.min_p is not None:
        probs = torch.softmax(logits, dim=-1)
        low = probs < draws.min_p.unsqueeze(-1) * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(low, float("-inf"))
    if draws.top_k is None or draws.top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    drop = rank >= draws.top_k.unsqueeze(-1)
    kept = ordered.masked_fill(drop, float("-inf"))
    probs = torch.softmax(kept, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    drop = drop | (before >= draws.top_p.unsqueeze(-1))
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
