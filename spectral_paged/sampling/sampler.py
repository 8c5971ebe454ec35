"""The vectorised sampler runs where the logits are and fetches its results once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_paged.device import upload
from spectral_paged.sampling.logprobs import TokenLogprobs
from spectral_paged.sampling.params import SamplingParams
from spectral_paged.sampling.rules import GREEDY_BELOW
from spectral_paged.sampling.state import SamplingState


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of a batch of logits: its parameters, and as much of the past as they need.

    num_output_tokens: tokens sampled before, known on the host or not.
    blocked_token_ids: tokens that are not allowed now.
    penalty_row: the row of `Penalties` that counts its tokens; -1 without penalties.
    rule_row: the row of `TokenRules` that has its rules; -1 without them.
    process: changes the row's logits, `[vocab]`, before anything else does.
    allowed: a bit for each token that is allowed now, in int32 words; None allows all.
    """

    params: SamplingParams
    seed: int
    num_output_tokens: int = 0
    blocked_token_ids: Sequence[int] = ()
    penalty_row: int = -1
    rule_row: int = -1
    allowed: np.ndarray[Any, Any] | None = None
    process: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Input tokens that the device has sampled and the host has not seen.

    ids: int64 `[N]` on the device.
    rows: the index into `ids` of places in the flat batch.
    """

    ids: Tensor
    rows: dict[int, int]

    def sources(self, num_tokens: int) -> list[int]:
        """The index into `ids` for each place in a flat batch of `num_tokens`; -1 for none."""
        found = [-1] * num_tokens
        for place, row in self.rows.items():
            found[place] = row
        return found


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
        state: the tables of rows with a `penalty_row` or a `rule_row`. `count` adds the sampled
            tokens to them.

    Attributes:
        ids: int64 `[N]` on the device, where the next step reads them.
    """

    def __init__(
        self, logits: Tensor, rows: Sequence[SampleRow], state: SamplingState | None = None
    ) -> None:
        logits = logits.float()
        self.rows = list(rows)
        self._state = state or SamplingState()
        changing = [i for i, row in enumerate(rows) if row.params.changes_logits]
        self._penalised = [i for i in changing if rows[i].penalty_row >= 0]
        self._ruled = [i for i in changing if rows[i].rule_row >= 0]
        self._masked = [i for i in changing if rows[i].allowed is not None]
        self._processed = [i for i in changing if rows[i].process is not None]
        adjusted = self._adjusted(logits)
        self.ids = _choose(adjusted, rows)
        empty = None
        if self._ruled or self._masked or self._processed:
            empty = ~(adjusted.amax(dim=-1, keepdim=True) > float("-inf"))  # NaN is no better
        super().__init__(logits, self.ids, [row.params.wanted for row in rows], empty)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """`logits` under rules, after penalties and with blocked tokens at -inf; a copy if there
        are any."""
        blocked = [(i, token) for i, row in enumerate(self.rows) for token in row.blocked_token_ids]
        if not (blocked or self._penalised or self._ruled or self._masked or self._processed):
            return logits
        logits = logits.clone()
        for i in self._processed:
            process = self.rows[i].process
            assert process is not None
            logits[i] = process(logits[i].clone())
        if self._masked:
            places = upload(self._masked, torch.long, logits.device)
            words = upload(
                np.stack([row.allowed for row in self.rows if row.allowed is not None]),
                torch.int32,
                logits.device,
            )
            logits[places] = _masked(logits[places], words)
        if self._ruled:
            places = upload(self._ruled, torch.long, logits.device)
            logits[places] = self._state.token_rules.apply(
                logits[places], [self.rows[i].rule_row for i in self._ruled]
            )
        if self._penalised:
            rows = [self.rows[i] for i in self._penalised]
            places = upload(self._penalised, torch.long, logits.device)
            logits[places] = self._state.penalties.apply(
                logits[places], [row.penalty_row for row in rows], [row.params for row in rows]
            )
        if blocked:
            row, token = upload(blocked, torch.long, logits.device).T
            least = logits.new_full((), float("-inf"))  # a number would be uploaded and waited for
            logits[row, token] = least
        return logits

    def count(self, times: int = 1) -> None:
        """Count the tokens in the tables of their rows; -1 times takes them back."""
        if self._penalised:
            rows = [self.rows[i].penalty_row for i in self._penalised]
            ids = self.ids[upload(self._penalised, torch.long, self.ids.device)]
            self._state.penalties.count(rows, ids, times)
        if self._ruled:
            rows = [self.rows[i].rule_row for i in self._ruled]
            ids = self.ids[upload(self._ruled, torch.long, self.ids.device)]
            self._state.token_rules.count(rows, ids, times)


def _masked(logits: Tensor, words: Tensor) -> Tensor:
    """`logits` `[N, vocab]` with -inf where the bits of `words`, int32 `[N, W]`, are 0."""
    bits = words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)
    forbidden = (bits & 1).flatten(1)[:, : logits.shape[-1]] == 0
    return logits.masked_fill(forbidden, float("-inf"))


def _choose(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    device = logits.device
    greedy = logits.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    if not drawn:
        return greedy
    params = [rows[i].params for i in drawn]
    places = upload(drawn, torch.long, device)
    heat = upload([p.temperature for p in params], torch.float32, device)
    hot = _filter(logits[places] / heat.unsqueeze(-1), params)
    seeds = upload([rows[i].seed for i in drawn], torch.int64, device)
    steps = upload([rows[i].num_output_tokens for i in drawn], torch.int64, device)
    gumbel = -torch.log(-torch.log(uniform_noise(seeds, steps, hot.shape[-1])))
    return greedy.index_copy(0, places, (hot + gumbel).argmax(dim=-1))


def _filter(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`logits` with the tokens that min-p, top-k and top-p leave out set to -inf."""
    device, vocab = logits.device, logits.shape[-1]
    if any(p.min_p > 0 for p in params):
        min_p = upload([p.min_p for p in params], torch.float32, device).unsqueeze(-1)
        probs = torch.softmax(logits, dim=-1)
        low = probs < min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(low, float("-inf"))
    top_k = [p.top_k if p.top_k > 0 else vocab for p in params]
    top_p = [p.top_p for p in params]
    if min(top_k) >= vocab and min(top_p) >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=device)
    drop = rank >= upload(top_k, torch.int64, device).unsqueeze(-1)
    kept = ordered.masked_fill(drop, float("-inf"))
    probs = torch.softmax(kept, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    drop = drop | (before >= upload(top_p, torch.float32, device).unsqueeze(-1))
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
