"""Sampling parameters and the vectorised sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectral_paged.errors import SamplingParamsError

MAX_N = 1024
MAX_FACTOR = 1e6  # what fp32 logits can be scaled by without overflow
MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # as in vLLM; logits over less would overflow fp32


@dataclass(frozen=True)
class SamplingParams:
    """How a request samples. Names and meaning are vLLM's.

    Args:
        n: completions for the prompt.
        temperature: 0 is greedy, and so is anything below 1e-5.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set whose probability reaches p.
        min_p: drop tokens below `min_p` times the highest probability.
        repetition_penalty: > 1 lowers tokens of prompt and output (Keskar et al. 2019).
        presence_penalty, frequency_penalty: subtracted for output tokens, once and per count.
        seed: same seed, same tokens, whatever else is in the batch.
        stop: strings that end a completion; not part of its text.
        stop_token_ids: ids that end a completion.
        max_tokens, min_tokens: bounds on generated tokens; below min no stop applies.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: log-probabilities of that many top tokens besides the chosen one.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        SamplingParamsError: a value outside its range; names the value and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = field(default_factory=tuple)
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise SamplingParamsError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def number(value: object) -> bool:
            return whole(value) or (isinstance(value, float) and math.isfinite(value))

        check("n", whole(self.n) and 1 <= self.n <= MAX_N, f"an integer between 1 and {MAX_N}")
        check(
            "temperature",
            number(self.temperature) and 0 <= self.temperature <= MAX_FACTOR,
            f"between 0 and {MAX_FACTOR:g}",
        )
        check(
            "top_k",
            whole(self.top_k) and -1 <= self.top_k < 2**31,
            "0 or -1 (all) or more, below 2^31",
        )
        check("top_p", number(self.top_p) and 0 < self.top_p <= 1, "in (0, 1]")
        check("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "in [0, 1]")
        check(
            "repetition_penalty",
            number(self.repetition_penalty)
            and 1 / MAX_FACTOR <= self.repetition_penalty <= MAX_FACTOR,
            f"between {1 / MAX_FACTOR:g} and {MAX_FACTOR:g}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(name, number(value) and -2 <= value <= 2, "in [-2, 2]")
        check("max_tokens", whole(self.max_tokens) and self.max_tokens >= 1, ">= 1")
        check(
            "min_tokens",
            whole(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        check(
            "logprobs",
            self.logprobs is None
            or (whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            f"None or between 0 and {MAX_LOGPROBS}",
        )
        check("seed", self.seed is None or whole(self.seed), "None or an integer")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        check(
            "stop",
            stops is None
            or (isinstance(stops, list | tuple) and all(isinstance(s, str) and s for s in stops)),
            "None, or strings that are not empty",
        )
        for name in ("ignore_eos", "skip_special_tokens"):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        check(
            "stop_token_ids",
            isinstance(self.stop_token_ids, list | tuple)
            and all(whole(t) and t >= 0 for t in self.stop_token_ids),
            "a list of token ids",
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of a batch of logits: how to sample it and what came before."""

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    blocked_token_ids: Sequence[int] = ()  # not before min_tokens


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's result. `logprobs` maps token id to (log-probability, rank)."""

    token_id: int
    logprob: float
    logprobs: dict[int, tuple[float, int]] | None


def uniform_noise(seeds: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Counter-based noise in (0, 1), fp32 `[N, vocab_size]`: a function of seed, step and token.

    SplitMix64's finaliser (Steele, Lea, Flood 2014) over a counter; no state, so a row's noise
    depends on nothing else in the batch and survives a preemption.
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


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Sample one token for each row of `logits` `[N, vocab]`.

    Order as in vLLM: log-probabilities of the raw logits, then penalties, then temperature,
    then min-p, top-k and top-p, then a draw by the Gumbel maximum.
    """
    logits = logits.float()
    chosen = _choose(logits, rows)
    logprobs = torch.log_softmax(logits, dim=-1)
    picked = logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    wanted = max((r.params.logprobs or 0 for r in rows), default=0)
    top = logprobs.topk(wanted, dim=-1) if wanted else None
    ids, values = chosen.tolist(), picked.tolist()
    ranks = (logprobs > picked.unsqueeze(-1)).sum(dim=-1).add(1).tolist()
    results = []
    for i, row in enumerate(rows):
        table = None
        if row.params.logprobs is not None:
            table = {ids[i]: (values[i], ranks[i])}
            if top is not None:
                best = zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)
                for rank, (token, value) in enumerate(best, start=1):
                    if rank <= row.params.logprobs:
                        table.setdefault(token, (value, rank))
        results.append(Sampled(ids[i], values[i], table))
    return results


def _choose(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    logits = _penalise(logits, rows)
    for i, row in enumerate(rows):
        if row.blocked_token_ids:
            logits[i, list(row.blocked_token_ids)] = float("-inf")
    greedy = logits.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    if not drawn:
        return greedy
    device = logits.device
    params = [rows[i].params for i in drawn]
    hot = logits[drawn] / torch.tensor([p.temperature for p in params], device=device).unsqueeze(-1)
    hot = _filter(hot, params)
    seeds = torch.tensor([rows[i].seed for i in drawn], dtype=torch.int64, device=device)
    steps = torch.tensor([len(rows[i].output_token_ids) for i in drawn], device=device)
    gumbel = -torch.log(-torch.log(uniform_noise(seeds, steps, hot.shape[-1])))
    chosen = greedy.clone()
    chosen[drawn] = (hot + gumbel).argmax(dim=-1)
    return chosen


def _penalise(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Repetition, presence and frequency penalties for the rows that ask for them."""
    picked = [i for i, row in enumerate(rows) if row.params.has_penalties]
    logits = logits.clone()
    if not picked:
        return logits
    device, vocab = logits.device, logits.shape[-1]
    counts = torch.zeros(len(picked), vocab, device=device)
    seen = torch.zeros(len(picked), vocab, dtype=torch.bool, device=device)
    for j, i in enumerate(picked):
        output = torch.tensor(list(rows[i].output_token_ids), dtype=torch.long, device=device)
        counts[j].scatter_add_(0, output, torch.ones_like(output, dtype=counts.dtype))
        seen[j, list(rows[i].prompt_token_ids)] = True
    seen |= counts > 0

    def column(name: str) -> Tensor:
        values = [float(getattr(rows[i].params, name)) for i in picked]
        return torch.tensor(values, device=device).unsqueeze(-1)

    part = logits[picked]
    factor = column("repetition_penalty")
    part = torch.where(seen, torch.where(part > 0, part / factor, part * factor), part)
    part = part - column("presence_penalty") * (counts > 0) - column("frequency_penalty") * counts
    logits[picked] = part
    return logits


def _filter(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask what min-p, top-k and top-p leave out."""
    device, vocab = logits.device, logits.shape[-1]
    min_p = torch.tensor([p.min_p for p in params], device=device).unsqueeze(-1)
    if bool((min_p > 0).any()):
        probs = torch.softmax(logits, dim=-1)
        low = probs < min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(low, float("-inf"))
    top_k = [p.top_k if p.top_k > 0 else vocab for p in params]
    top_p = [p.top_p for p in params]
    if min(top_k) >= vocab and min(top_p) >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=device)
    drop = rank >= torch.tensor(top_k, device=device).unsqueeze(-1)
    kept = ordered.masked_fill(drop, float("-inf"))
    probs = torch.softmax(kept, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    drop = drop | (before >= torch.tensor(top_p, device=device).unsqueeze(-1))
    drop[:, 0] = False
    return logits.masked_fill(
        torch.zeros_like(drop).scatter(-1, order, drop), float("-inf")
    )
