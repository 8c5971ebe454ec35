"""The sampling parameters of a request, checked when they are made and when one is assigned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from spectral_paged.errors import SamplingParamsError, shown, suggestion
from spectral_paged.outputs import RequestOutputKind
from spectral_paged.sampling.logits_processors import LogitsProcessor
from spectral_paged.sampling.logprobs import Wanted
from spectral_paged.sampling.repetition import RepetitionDetectionParams
from spectral_paged.sampling.rules import RULES
from spectral_paged.sampling.structured_outputs import StructuredOutputsParams

MAX_API_BIAS = 100.0  # of OpenAI's API
# what `SamplingParams` derives from its fields, until one of them is assigned
_DERIVED = ("wanted", "wanted_of_prompt", "has_penalties", "has_token_rules", "changes_logits")


@dataclass
class SamplingParams:
    """The parameters by which a request samples; names and meaning are vLLM's.

    Numbers and lists of numpy and torch become Python's own. A field may be assigned; a request
    keeps the values that it was queued with.

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
        max_tokens, min_tokens: bounds on generated tokens; below `min_tokens` nothing stops. A
            `max_tokens` of None is the room that `max_model_len` and the pool leave. With
            `max_tokens=0` the prompt is computed, and nothing is generated.
        ignore_eos: continue past the end-of-sequence token.
        logprobs: number of top tokens whose log-probabilities are returned besides the chosen
            token's; -1: all tokens. An LLM allows as many as its `max_logprobs`.
        prompt_logprobs: the same for the tokens of the prompt, each under the tokens before it.
            Such a request computes its whole prompt, without the prefix cache.
        logprob_token_ids: tokens whose log-probabilities are returned besides the chosen token's;
            `logprobs`, if given, is their number.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: False joins special tokens that follow each other, where the
            text has them.
        include_stop_str_in_output: keep the stop string, or the text of the token that ends the
            completion, in the text.
        detokenize: False leaves the text empty; there are no stop strings then.
        truncate_prompt_tokens: keep so many tokens of the prompt's end; -1 keeps as many as
            `max_model_len` allows.
        logit_bias: added to logits, by token id.
        allowed_token_ids: the only tokens that may be sampled.
        bad_words: strings that the output never has: the last token of each, as the tokenizer
            splits it, is not sampled behind the ones before it.
        repetition_detection: ends a completion whose end repeats itself.
        structured_outputs: the form that the completion has to have; end tokens come where it is
            complete, and the completion ends where nothing may follow.
        logits_processors: functions that change the logits of the next token, in order, before
            everything else does: see `LogitsProcessor`.
        output_kind: what `Engine.step` returns of a request before its end.

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
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = field(default_factory=tuple)
    repetition_detection: RepetitionDetectionParams | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: Sequence[LogitsProcessor] = field(default_factory=tuple)
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in RULES:
            known = suggestion(name, list(RULES))
            raise AttributeError(f"SamplingParams has no field {name!r}{': ' * bool(known)}{known}")
        super().__setattr__(name, RULES[name].check(value, name))
        for known in _DERIVED:
            self.__dict__.pop(known, None)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refused(
                f"min_tokens is {shown(self.min_tokens)}; it must be between 0 and max_tokens "
                f"({shown(self.max_tokens)})",
                "min_tokens",
            )
        if self.stop and not self.detokenize:
            raise _refused(
                f"stop is {shown(self.stop)}, and detokenize is False: stop strings are looked for "
                "in the text, so give stop_token_ids, or leave detokenize out",
                "stop",
            )
        ids = self.logprob_token_ids
        if ids is not None and self.logprobs not in (None, len(ids)):
            raise _refused(
                f"logprobs is {shown(self.logprobs)}; with logprob_token_ids it must be None or "
                f"their number ({len(ids)})",
                "logprobs",
            )

    def __hash__(self) -> int:  # fields may be lists and mappings
        return hash(tuple(_hashable(getattr(self, name)) for name in RULES))

    @classmethod
    def from_optional(cls, **given: Any) -> SamplingParams:
        """Return parameters of what an API's request gives, as vLLM's method does.

        None stands for the default, and biases beyond 100 for 100, which OpenAI's API ends at.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if "logit_bias" in given:
            biases = RULES["logit_bias"].check(given["logit_bias"], "logit_bias")
            given["logit_bias"] = {
                token: min(MAX_API_BIAS, max(-MAX_API_BIAS, bias)) for token, bias in biases.items()
            }
        return cls(**given)

    def clone(self) -> SamplingParams:
        """Return a checked copy that has no list or mapping in common with this one.

        Raises:
            SamplingParamsError: fields that were assigned do not go together.
        """
        return replace(self)

    def told_as(self, kind: RequestOutputKind) -> SamplingParams:
        """Return a copy that differs in `output_kind` only; nothing else is checked again."""
        found = copy(self)
        found.output_kind = kind
        return found

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @cached_property  # the sampler asks for every token
    def wanted(self) -> Wanted | None:
        """The log-probabilities of a generated token besides its own; None: no table."""
        if self.logprob_token_ids is not None:
            return Wanted(0, tuple(self.logprob_token_ids))
        return None if self.logprobs is None else Wanted(self.logprobs)

    @cached_property
    def wanted_of_prompt(self) -> Wanted | None:
        """The log-probabilities of a prompt token besides its own; None: of none."""
        return None if self.prompt_logprobs is None else Wanted(self.prompt_logprobs)

    @cached_property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @cached_property
    def has_token_rules(self) -> bool:
        return bool(self.logit_bias or self.allowed_token_ids or self.bad_words)

    @cached_property  # the engine asks for every token
    def changes_logits(self) -> bool:
        """True if tokens are drawn from other logits than the model's."""
        return self.has_penalties or self.has_token_rules or self.reads_output

    @property
    def reads_output(self) -> bool:
        """True if the host has to know all tokens before the next one is drawn."""
        return self.structured_outputs is not None or bool(self.logits_processors)


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozenset(value.items())
    return tuple(value) if isinstance(value, list) else value


def _refused(message: str, name: str) -> SamplingParamsError:
    error = SamplingParamsError(message)
    error.param = name
    return error
