"""Speculation is configured by a mapping, as in vLLM: its method, and how much it guesses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from spectral_paged.errors import InvalidRequestError, shown

NAME = "speculative_config"
METHOD = "ngram"
MAX_SPECULATIVE_TOKENS = 15
DEFAULT_NGRAM = 5  # tokens, where neither bound is given; vLLM's
ROWS_OF_FEW = 64  # tokens of a step that have room whatever max_num_seqs is


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """The configuration of n-gram look-up; names and meaning are vLLM's.

    The tokens that followed the last few tokens of a sequence where these stood before are the
    draft of its next tokens.

    Args:
        num_speculative_tokens: most tokens of a draft, 1 to 15.
        prompt_lookup_max, prompt_lookup_min: the longest and the shortest n-gram that is looked
            for. One that is not given is the other one; 5 if none is.
        method: `ngram`, the only one, which needs no draft model.

    Raises:
        InvalidRequestError: a value outside its range, or another method.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    method: str = METHOD

    def __post_init__(self) -> None:
        if self.method != METHOD:
            raise _refused("method", self.method, f"'{METHOD}', because no draft model is run")
        either = self.prompt_lookup_max, self.prompt_lookup_min
        for name, other in zip(
            ("prompt_lookup_max", "prompt_lookup_min"), either[::-1], strict=True
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, DEFAULT_NGRAM if other is None else other)
        most = MAX_SPECULATIVE_TOKENS
        if not _is_count(self.num_speculative_tokens) or self.num_speculative_tokens > most:
            value = self.num_speculative_tokens
            raise _refused("num_speculative_tokens", value, f"an integer between 1 and {most}")
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            if not _is_count(getattr(self, name)):
                raise _refused(name, getattr(self, name), "an integer of at least 1")
        if self.shortest > self.longest:
            raise _refused(
                "prompt_lookup_min", self.shortest, f"at most prompt_lookup_max ({self.longest})"
            )

    @property
    def longest(self) -> int:
        """The tokens of the longest n-gram that is looked for."""
        assert self.prompt_lookup_max is not None
        return self.prompt_lookup_max

    @property
    def shortest(self) -> int:
        """The tokens of the shortest n-gram that is looked for."""
        assert self.prompt_lookup_min is not None
        return self.prompt_lookup_min

    def num_rows(self, max_num_seqs: int) -> int:
        """The most tokens of sequences that generate in one step, drafts among them.

        They are as many as sequences, so that drafts only take what these leave; but a few
        sequences have room for all of their drafts.
        """
        each = 1 + self.num_speculative_tokens
        return max(max_num_seqs, min(max_num_seqs * each, ROWS_OF_FEW))

    @classmethod
    def read(cls, value: Any) -> SpeculativeConfig | None:
        """Return the configuration of a mapping or of its JSON; None stands for none.

        Raises:
            InvalidRequestError: it is no such mapping, or a value of it is not served.
        """
        if value is None or isinstance(value, SpeculativeConfig):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InvalidRequestError(
                    f"{NAME} is {shown(value)}, no JSON ({error}); write "
                    f'{{"method": "{METHOD}", "num_speculative_tokens": 5}}'
                ) from None
        if not isinstance(value, Mapping):
            raise InvalidRequestError(
                f"{NAME} is {shown(value)}; it must be a mapping, its JSON, or None"
            )
        given = {name: item for name, item in value.items() if item is not None}
        known = [field.name for field in fields(cls)]
        if "method" in given and given["method"] != METHOD:
            cls(1, method=given["method"])  # says more than that its other values are unknown
        if unknown := [name for name in given if name not in known]:
            raise InvalidRequestError(
                f"{NAME} has {shown(unknown[0])}, which is not served; it takes {', '.join(known)}"
            )
        if "num_speculative_tokens" not in given:
            raise InvalidRequestError(
                f"{NAME} has no num_speculative_tokens: give an integer between 1 and "
                f"{MAX_SPECULATIVE_TOKENS}"
            )
        return cls(**given)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _refused(name: str, value: Any, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{NAME}: {name} is {shown(value)}; it must be {text}")
