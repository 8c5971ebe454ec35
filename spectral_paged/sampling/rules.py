"""The values that each sampling parameter may have: checks, and JSON schemas that say the same."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from spectral_paged.errors import SamplingParamsError, shown
from spectral_paged.outputs import RequestOutputKind
from spectral_paged.sampling.plain_values import plain
from spectral_paged.sampling.repetition import RepetitionDetectionParams
from spectral_paged.sampling.structured_outputs import StructuredOutputsParams

MAX_N = 1024
MAX_FACTOR = 1e6  # fp32 logits scaled by it do not overflow
MAX_LOGPROB_IDS = 128  # as in vLLM
MAX_BAD_WORDS = 256  # a request's table of them stays below its other tables
MAX_WORD_CHARS = 128
GREEDY_BELOW = 1e-5  # as in vLLM; logits divided by less would overflow fp32
DIGITS = re.compile("^[0-9]{1,18}$")


@dataclass(frozen=True, slots=True)
class Rule:
    """The values that one parameter may have.

    Attributes:
        text: the values as an error message names them.
        admits: True for such a value.
        schema: the JSON schema of such values, null aside.
        read: makes such a value of what JSON has in its place.
    """

    text: str
    admits: Callable[[Any], bool]
    schema: Mapping[str, Any]
    read: Callable[[Any], Any] = plain

    def check(self, value: object, name: str) -> Any:
        """Return the value as the parameter has it: plain, and of the parameter's own type.

        Raises:
            SamplingParamsError: `error.param` is `name`.
        """
        value = self.read(value)
        if not self.admits(value):
            error = SamplingParamsError(f"{name} is {shown(value)}; it must be {self.text}")
            error.param = name
            raise error
        return value


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
    return replace(rule, admits=lambda value: value is None or rule.admits(value))


def _read_list(value: Any) -> Any:
    """Return a list or tuple with plain values."""
    value = plain(value)
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(plain, value))
    return value


def _read_list_or_none(value: Any) -> Any:
    return () if value is None else _read_list(value)  # as in vLLM


def _read_biases(value: Any) -> Any:
    """Return biases by token id, which are strings as the names of a JSON object."""
    if not isinstance(value, Mapping):
        return value
    return {
        int(token) if isinstance(token, str) and DIGITS.fullmatch(token) else plain(token): plain(
            bias
        )
        for token, bias in value.items()
    }


def _read_repetition(value: Any) -> Any:
    if (
        isinstance(value, Mapping)
        and value.keys() <= RepetitionDetectionParams.SCHEMA["properties"].keys()
    ):
        return RepetitionDetectionParams(**value)
    return value


def _are_stops(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return stops is None or (
        isinstance(stops, list | tuple) and all(isinstance(s, str) and s for s in stops)
    )


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_whole(t) and t >= 0 for t in value)


def _are_words(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= MAX_BAD_WORDS
        and all(isinstance(word, str) and 0 < len(word) <= MAX_WORD_CHARS for word in value)
    )


def _are_biases(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_whole(token) and token >= 0 and _BIAS.admits(bias) for token, bias in value.items()
    )


_TEXT = {"type": "string", "minLength": 1}
_FLAG = Rule("True or False", lambda value: isinstance(value, bool), {"type": "boolean"})
_PENALTY = _number("in [-2, 2]", -2, 2)
_BIAS = _number("", -MAX_FACTOR, MAX_FACTOR)
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
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
        _read_list,
    ),
    "stop_token_ids": Rule(
        "a list of token ids",
        _are_token_ids,
        _IDS,
        _read_list_or_none,
    ),
    "max_tokens": _or_none(_whole("None or >= 0", 0)),
    "min_tokens": _whole("between 0 and max_tokens", 0),
    "ignore_eos": _FLAG,
    "logprobs": _or_none(_whole("None, -1 (all tokens) or more", -1)),
    "prompt_logprobs": _or_none(_whole("None, -1 (all tokens) or more", -1)),
    "logprob_token_ids": _or_none(
        Rule(
            f"None, or a list of 1 to {MAX_LOGPROB_IDS} token ids",
            lambda value: _are_token_ids(value) and 1 <= len(value) <= MAX_LOGPROB_IDS,
            _IDS | {"minItems": 1, "maxItems": MAX_LOGPROB_IDS},
            _read_list,
        )
    ),
    "skip_special_tokens": _FLAG,
    "spaces_between_special_tokens": _FLAG,
    "include_stop_str_in_output": _FLAG,
    "detokenize": _FLAG,
    "truncate_prompt_tokens": Rule(
        "None, -1 (what max_model_len allows) or >= 1",
        lambda value: value is None or (_is_whole(value) and (value == -1 or value >= 1)),
        {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}]},
    ),
    "logit_bias": _or_none(
        Rule(
            f"None or numbers between -{MAX_FACTOR:g} and {MAX_FACTOR:g} by token id",
            _are_biases,
            {
                "type": "object",
                "propertyNames": {"pattern": DIGITS.pattern},
                "additionalProperties": _BIAS.schema,
            },
            _read_biases,
        )
    ),
    "allowed_token_ids": _or_none(
        Rule(
            "None or a list of token ids that is not empty",
            lambda value: _are_token_ids(value) and len(value) > 0,
            _IDS | {"minItems": 1},
            _read_list,
        )
    ),
    "bad_words": Rule(
        f"a list of up to {MAX_BAD_WORDS} strings of 1 to {MAX_WORD_CHARS} characters",
        _are_words,
        {
            "type": "array",
            "items": _TEXT | {"maxLength": MAX_WORD_CHARS},
            "maxItems": MAX_BAD_WORDS,
        },
        _read_list_or_none,
    ),
    "repetition_detection": _or_none(
        Rule(
            "None or RepetitionDetectionParams(...)",
            lambda value: isinstance(value, RepetitionDetectionParams),
            RepetitionDetectionParams.SCHEMA,
            _read_repetition,
        )
    ),
    "structured_outputs": _or_none(
        Rule(
            "None or StructuredOutputsParams(...)",
            lambda value: isinstance(value, StructuredOutputsParams),
            StructuredOutputsParams.SCHEMA,
            StructuredOutputsParams.read,
        )
    ),
    "logits_processors": Rule(
        "a list of callables",
        lambda value: isinstance(value, list | tuple) and all(map(callable, value)),
        {},
        lambda value: () if value is None else value,
    ),
    "output_kind": Rule(
        "a RequestOutputKind", lambda value: isinstance(value, RequestOutputKind), {}
    ),
}
