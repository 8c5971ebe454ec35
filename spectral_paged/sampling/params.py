"""The sampling parameters of a request, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from spectral_paged.errors import SamplingParamsError, shown

MAX_N = 1024
MAX_FACTOR = 1e6  # fp32 logits scaled by it do not overflow
MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # as in vLLM; logits divided by less would overflow fp32


@dataclass(frozen=True)
class SamplingParams:
    """The parameters by which a request samples; names and meaning are vLLM's.

    Args:
        n: number of completions of the prompt.
        temperature: values below 1e-5 sample greedily.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set whose probability reaches p.
        min_p: drop tokens below `min_p` times the highest probability.
        repetition_penalty: above 1 lowers logits of tokens in prompt and output (Keskar et al.
            2019).
        presence_penalty, frequency_penalty: subtracted from logits of output tokens, once and per
            occurrence.
        seed: the same seed gives the same tokens, whatever else is in the batch; a negative one
            stands for none.
        stop: strings that end a completion; its text does not contain them.
        stop_token_ids: ids that end a completion.
        max_tokens, min_tokens: bounds on generated tokens; below `min_tokens` nothing stops.
        ignore_eos: continue past the end-of-sequence token.
        logprobs: number of top tokens whose log-probabilities are returned besides the chosen
            token's.
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
                error = SamplingParamsError(
                    f"{name} is {shown(getattr(self, name))}; it must be {rule}"
                )
                error.param = name
                raise error

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
            f"between 0 and max_tokens ({shown(self.max_tokens)})",
        )
        check(
            "logprobs",
            self.logprobs is None or (whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
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
