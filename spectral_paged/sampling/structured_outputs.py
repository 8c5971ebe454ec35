"""The form that a completion has to have: a JSON schema, a regex, a choice or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from spectral_paged.errors import SamplingParamsError, shown

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_TEXT = 1 << 20  # characters of a regex or grammar
MAX_CHOICES = 10_000
_TEXT = {"type": ["string", "null"], "minLength": 1}
_FLAG = {"type": ["boolean", "null"]}


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a completion has to match, as a whole; names and meaning are vLLM's. Give one of five.

    Args:
        json: a JSON schema, as an object or its text.
        regex: a regular expression of Rust's `regex` crate, without look-around.
        choice: the texts that there are to choose from.
        grammar: a grammar in Lark's syntax, or in llama.cpp's GBNF.
        json_object: True: any JSON object.
        disable_any_whitespace: JSON has no whitespace but in strings.
        disable_additional_properties: objects of `json` have the properties that it names and no
            others, where it does not say.
        whitespace_pattern: regex of the whitespace between parts of JSON.

    Attributes:
        text: all of it as JSON, made once. Grammars are compiled from it and known by it.

    Raises:
        SamplingParamsError: none or several are given, one is of another type, or the schema has
            values that JSON does not have.
    """

    SCHEMA: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {
            "json": {"type": ["object", "string", "null"], "minLength": 1},
            "regex": _TEXT,
            "choice": {
                "type": ["array", "null"],
                "items": {"type": "string", "minLength": 1},
                "minItems": 1,
            },
            "grammar": _TEXT,
            "json_object": {"enum": [True, None]},
            "disable_any_whitespace": _FLAG,
            "disable_additional_properties": _FLAG,
            "whitespace_pattern": _TEXT,
            "structural_tag": {"type": "null"},
        },
        "oneOf": [
            {"required": [kind], "properties": {kind: {"not": {"type": "null"}}}} for kind in KINDS
        ],
        "additionalProperties": False,
    }

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise _refused(f"structured_outputs has {found}; give one of {', '.join(KINDS)}")
        if isinstance(self.choice, tuple):
            object.__setattr__(self, "choice", list(self.choice))
        rules = {
            "json": (_is_schema, "a JSON schema: an object, or its text"),
            "regex": (_is_text, f"a string of 1 to {MAX_TEXT} characters"),
            "choice": (_is_choice, f"a list of 1 to {MAX_CHOICES} strings that are not empty"),
            "grammar": (_is_text, f"a string of 1 to {MAX_TEXT} characters"),
            "json_object": (lambda value: value is True, "True"),
            "whitespace_pattern": (_is_text, f"a string of 1 to {MAX_TEXT} characters"),
        }
        for name, (admits, text) in rules.items():
            value = getattr(self, name)
            if value is not None and not admits(value):
                raise _refused(f"structured_outputs.{name} is {shown(value)}; it must be {text}")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, False)
            elif not isinstance(value, bool):
                raise _refused(
                    f"structured_outputs.{name} is {shown(value)}; it must be True or False"
                )
        form = {known.name: getattr(self, known.name) for known in fields(self) if known.init}
        try:  # the order of properties is that of the answer
            text = json.dumps(form, default=dict)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(f"structured_outputs cannot be written as JSON: {error}") from None
        object.__setattr__(self, "text", text)

    def __hash__(self) -> int:  # schemas are mappings
        return hash((self.regex, self.grammar, self.json_object))

    @classmethod
    def read(cls, value: Any) -> Any:
        """Return parameters from an object of JSON; other values are returned unchanged."""
        if not isinstance(value, Mapping):
            return value
        names = {known.name for known in fields(cls) if known.init}
        # vLLM's parameters have a field more, which is null in those that are served
        value = {k: v for k, v in value.items() if k != "structural_tag" or v is not None}
        extra = sorted(str(name) for name in value if name not in names)
        if extra:
            raise _refused(
                f"structured_outputs has {shown(extra)}; it takes {', '.join(sorted(names))}"
            )
        return cls(**value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT


def _is_schema(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_text(value)


def _is_choice(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_CHOICES
        and all(isinstance(text, str) and text for text in value)
    )


def _refused(message: str) -> SamplingParamsError:
    error = SamplingParamsError(message)
    error.param = "structured_outputs"
    return error
