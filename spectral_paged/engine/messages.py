"""Conversations are checked, and their content becomes text, by the same code for every caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectral_paged.errors import refusal, shown

Message = Mapping[str, Any]
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that is messages, which the chat template turns into tokens. They are unchecked."""

    messages: object


def conversations(messages: object) -> list[Conversation]:
    """Return one conversation, or each of a list of conversations."""
    if isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple):
        return [Conversation(one) for one in messages]
    return [Conversation(messages)]


def check_messages(messages: object) -> list[dict[str, str]]:
    """Return a conversation whose every message has a known role and text as its content.

    Text parts are joined by line ends, as vLLM does for templates of strings.

    Raises:
        InvalidRequestError: anything else; `error.param` is the place, such as
            `messages.0.content`.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise refusal("messages must be a list of {'role': ..., 'content': ...}", "messages")
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise refusal(f"{where} must be an object", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refusal(f"{where}.role must be one of {sorted(ROLES)}", f"{where}.role")
    extra = sorted(str(k) for k, v in message.items() if _is_extra(k, v))
    if extra:
        raise refusal(f"{where} has {shown(extra)}, which are not supported", f"{where}.{extra[0]}")
    found = {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content")}
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise refusal(f"{where}.name must be a string", f"{where}.name")
        found["name"] = name
    return found


def _is_extra(key: object, value: object) -> bool:
    """Return whether a message's field is unknown and asks for something."""
    return key not in ("role", "content", "name") and bool(value)


def _content(content: object, where: str) -> str:
    """Return text, or text parts joined by line ends."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise refusal(f"{where} must be a string or a list of text parts", where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise refusal(f"{where}.{i} must be an object with a type", f"{where}.{i}")
        if part["type"] != "text":
            raise refusal(
                f"{where}.{i} is of type {shown(part['type'])}; models here read text only",
                f"{where}.{i}.type",
            )
        if not isinstance(part.get("text"), str):
            raise refusal(f"{where}.{i}.text must be a string", f"{where}.{i}.text")
        texts.append(part["text"])
    return "\n".join(texts)
