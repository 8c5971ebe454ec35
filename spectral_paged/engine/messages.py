"""Conversations are checked, and their content becomes text, by the same code for every caller."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from spectral_paged.errors import refusal, shown
from spectral_paged.sampling import plain_list

Message = Mapping[str, Any]
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# fields of OpenAI's messages and of its answers that are not served; None and [] ask for nothing
UNSERVED = frozenset(
    ("annotations", "audio", "function_call", "reasoning", "reasoning_content", "refusal")
    + ("tool_call_id", "tool_calls")
)
# what `check_messages` takes
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": sorted(ROLES)},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            "required": ["type", "text"],
                            "additionalProperties": False,
                        },
                    },
                ]
            },
            "name": {"type": ["string", "null"]},
            **{name: {"enum": [None, []]} for name in sorted(UNSERVED)},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that is messages, which the chat template turns into tokens. They are unchecked.

    allow_special_tokens: None: as the LLM was told.
    """

    messages: object
    allow_special_tokens: bool | None = None


def conversations(messages: object, allow_special_tokens: bool | None = None) -> list[Conversation]:
    """Return one conversation, or each of a list or column of conversations.

    Raises:
        InvalidRequestError: `messages` is a table.
    """
    given = plain_list(messages, "messages")
    if given and isinstance(given[0], list | tuple):
        return [Conversation(one, allow_special_tokens) for one in given]
    return [Conversation(messages if given is None else given, allow_special_tokens)]


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Return a conversation whose every message has a known role and text as its content.

    Text parts are joined by line ends, as vLLM does for templates of strings.

    Raises:
        InvalidRequestError: anything else; `error.param` is the place, such as
            `messages.0.content`.
    """
    messages = plain_list(messages, "messages")
    if not messages:
        raise refusal("messages must be a list of {'role': ..., 'content': ...}", "messages")
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise refusal(f"{where} must be an object", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refusal(f"{where}.role must be one of {sorted(ROLES)}", f"{where}.role")
    _refuse_extra(message, ("role", "content", "name"), where)
    found = {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content")}
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise refusal(f"{where}.name must be a string", f"{where}.name")
        found["name"] = name
    return found


def _refuse_extra(found: Mapping[Any, Any], served: Collection[str], where: str) -> None:
    """Refuse fields that are neither served nor ask for nothing."""
    extra = sorted(
        str(name)
        for name, value in found.items()
        if name not in served and not (name in UNSERVED and (value is None or value == []))
    )
    if extra:
        raise refusal(f"{where} has {shown(extra)}, which are not supported", f"{where}.{extra[0]}")


def _content(content: object, where: str) -> str:
    """Return text, or text parts joined by line ends."""
    if isinstance(content, str):
        return content
    parts = plain_list(content, where)
    if not parts:
        raise refusal(f"{where} must be a string or a list of text parts", where)
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise refusal(f"{where}.{i} must be an object with a type", f"{where}.{i}")
        if part["type"] != "text":
            raise refusal(
                f"{where}.{i} is of type {shown(part['type'])}; models here read text only",
                f"{where}.{i}.type",
            )
        if not isinstance(part.get("text"), str):
            raise refusal(f"{where}.{i}.text must be a string", f"{where}.{i}.text")
        _refuse_extra(part, ("type", "text"), f"{where}.{i}")
        texts.append(part["text"])
    return "\n".join(texts)
