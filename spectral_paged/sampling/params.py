"""The sampling parameters of a request, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from spectral_paged.errors import SamplingParamsError, shown
from spectral_paged.sampling.plain_values import plain

MAX_N = 1024
MAX_FACTOR = 1e6  # fp32 logits scaled by it do not overflow
MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # as in vLLM; logits divided by less would overflow fp32


@dataclass(frozen=True, slots=True)
class Rule:
    """The values that one parameter may have.

    Attributes:
        text: the values as an error message names them.
        admits: True for such a value.
        schema: the JSON schema of such values, null aside.
    """

    text: str
    admits: Callable[[Any], bool]
    schema: Mapping[str, Any]

    def check(self, value: object, name: str) -> None:
        """Refuse a wrong value.

        Raises:
            SamplingParamsError: `error.param` is `name`.
        """
        if not self.admits(value):
            error = SamplingParamsError(f"{name} is {shown(value)}; it must be {self.text}")
            error.param = name
            raise error


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(text: str, least: int | None = None, most: int | None = None) -> Rule:
    def admits(value: Any) -> bool:
        return _is_whole(value) and (
            (least is None or least <= value) and (most is None or value <= most)
        )

    bounds = {"minimum": least, "maximum": most}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return Rule(text, admits, {"type": "integer"} | given)


def _number(text: str, least: float, most: float, *, above: bool = False) -> Rule:
    """Return the rule of a finite number; `above`: `least` itself is none."""

    def admits(value: Any) -> bool:
        if not _is_whole(value) and not (isinstance(value, float) and math.isfinite(value)):
            return False
        return (least < value if above else least <= value) and value <= most

    name = "exclusiveMinimum" if above else "minimum"
    return Rule(text, admits, {"type": "number", name: least, "maximum": most})


def _or_none(rule: Rule) -> Rule:
    return Rule(rule.text, lambda value: value is None or rule.admits(value), rule.schema)


def _are_stops(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return stops is None or (
        isinstance(stops, list | tuple) and all(isinstance(s, str) and s for s in stops)
    )


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_whole(t) and t >= 0 for t in value)


_TEXT = {"type": "string", "minLength": 1}
_FLAG = Rule("True or False", lambda value: isinstance(value, bool), {"type": "boolean"})
_PENALTY = _number("in [-2, 2]", -2, 2)
# `min_tokens` has `max_tokens` for an upper bound too
RULES: Mapping[str, Rule] = {
    "n": _whole(f"an integer between 1 and {MAX_N}", 1, MAX_N),
    "temperature": _number(f"between 0 and {MAX_FACTOR:g}", 0, MAX_FACTOR),
    "top_k": _whole("0 or -1 (all) or more, below 2^31", -1, 2**31 - 1),
    "top_p": _number("in (0, 1]", 0, 1, above=True),
    "min_p": _number("in [0, 1]", 0, 1),
    "repetition_penalty": _number(
        f"between {1 / MAX_FACTOR:g} and {MAX_FACTOR:g}", 1 / MAX_FACTOR, MAX_FACTOR
    ),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "seed": _or_none(_whole("None or an integer")),
    "stop": Rule(
        "None, or strings that are not empty",
        _are_stops,
        {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    ),
    "stop_token_ids": Rule(
        "a list of token ids",
        _are_token_ids,
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
    ),
    "max_tokens": _whole(">= 1", 1),
    "min_tokens": _whole("between 0 and max_tokens", 0),
    "ignore_eos": _FLAG,
    "logprobs": _or_none(_whole(f"None or between 0 and {MAX_LOGPROBS}", 0, MAX_LOGPROBS)),
    "skip_special_tokens": _FLAG,
}


@dataclass(frozen=True)
class SamplingParams:
    """The parameters by which a request samples; names and meaning are vLLM's.

    Numbers and lists of numpy and torch become Python's own.

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
        for name, rule in RULES.items():
            value = plain(getattr(self, name))
            if name == "stop_token_ids" and value is None:  # as in vLLM
                value = ()
            elif isinstance(value, list | tuple):
                value = (tuple if isinstance(value, tuple) else list)(map(plain, value))
            object.__setattr__(self, name, value)
            rule.check(value, name)
        if self.min_tokens > self.max_tokens:
            error = SamplingParamsError(
                f"min_tokens is {shown(self.min_tokens)}; it must be between 0 and max_tokens "
                f"({shown(self.max_tokens)})"
            )
            error.param = "min_tokens"
            raise error

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @cached_property  # the engine asks for every token
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
