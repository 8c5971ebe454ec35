"""Conversations are checked, and their content becomes text, by the same code for every caller."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack

from spectral_paged.engine.chat_template import ChatOptions
from spectral_paged.errors import refusal, shown
from spectral_paged.sampling import plain_list

Message = Mapping[str, Any]
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# fields of OpenAI's messages and of its answers that are not served; None and [] ask for nothing
UNSERVED = frozenset(
    ("annotations", "audio", "function_call", "reasoning", "reasoning_content", "refusal")
)
# fields of one role, which ask for nothing in the others where they are None or []
OF_TOOLS = {"assistant": "tool_calls", "tool": "tool_call_id"}


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


_NOTHING: dict[str, Any] = {"enum": [None, []]}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_TEXT_PART = _object({"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text")
_CONTENT: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}]
}
_CALL = _object(
    {
        "id": _TEXT_OR_NULL,
        "index": {"type": ["integer", "null"]},
        "type": {"enum": [None, "function"]},
        "function": _object(
            {
                "name": {"type": "string", "minLength": 1},
                "arguments": {"type": ["string", "object", "null"]},
            },
            "name",
        ),
    },
    "function",
)
_CALLS: dict[str, Any] = {"type": "array", "minItems": 1, "items": _CALL}


def _message_schema(roles: Collection[str], *required: str, **own: Any) -> dict[str, Any]:
    fields = dict.fromkeys(sorted({*UNSERVED, *OF_TOOLS.values()}), _NOTHING)
    fields |= {"role": {"enum": sorted(roles)}, "content": _CONTENT, "name": _TEXT_OR_NULL}
    return _object(fields | own, "role", *required)


# what `check_messages` takes, but for the text of arguments, which is JSON too
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _message_schema(ROLES, "content"),
            _message_schema(
                ["assistant"],
                "tool_calls",
                content={"anyOf": [{"type": "null"}, _CONTENT]},
                tool_calls=_CALLS,
            ),
            _message_schema(["tool"], "content", tool_call_id=_TEXT_OR_NULL),
        ]
    },
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that is messages, which the chat template turns into tokens. They are unchecked.

    allow_special_tokens: None: as the LLM was told.
    options: the fields of `ChatTemplate`.
    """

    messages: object
    allow_special_tokens: bool | None = None
    options: ChatOptions = field(default_factory=ChatOptions)


def conversations(
    messages: object, allow_special_tokens: bool | None = None, **options: Unpack[ChatOptions]
) -> list[Conversation]:
    """Return one conversation, or each of a list or column of conversations.

    Raises:
        InvalidRequestError: `messages` is a table.
        TypeError: an option does not exist.
    """
    if unknown := sorted(options.keys() - ChatOptions.__annotations__.keys()):
        raise TypeError(f"chat takes no {unknown[0]!r}: {', '.join(ChatOptions.__annotations__)}")
    given = plain_list(messages, "messages")
    if given and isinstance(given[0], list | tuple):
        return [Conversation(one, allow_special_tokens, options) for one in given]
    return [Conversation(messages if given is None else given, allow_special_tokens, options)]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return a conversation whose every message has a known role and text as its content.

    Text parts are joined by line ends, as vLLM does for templates of strings. The arguments of a
    tool call, which are text in OpenAI's form, become the object that templates take.

    Raises:
        InvalidRequestError: anything else; `error.param` is the place, such as
            `messages.0.content`.
    """
    messages = plain_list(messages, "messages")
    if not messages:
        raise refusal("messages must be a list of {'role': ..., 'content': ...}", "messages")
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise refusal(f"{where} must be an object", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refusal(f"{where}.role must be one of {sorted(ROLES)}", f"{where}.role")
    own = OF_TOOLS.get(role, "")
    idle = {*UNSERVED, *OF_TOOLS.values()}
    _refuse_extra(message, ("role", "content", "name", own), where, idle)
    found: dict[str, Any] = {"role": ROLES[role]}
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls is not None and calls != []:
        found["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    # a call has nothing to say beside it
    found["content"] = "" if calls and content is None else _content(content, f"{where}.content")
    for key in ("name", "tool_call_id"):
        value = message.get(key)
        if value is not None and value != []:
            if not isinstance(value, str):
                raise refusal(f"{where}.{key} must be a string", f"{where}.{key}")
            found[key] = value
    return found


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    listed = plain_list(calls, where)
    if not listed:
        raise refusal(f"{where} must be a list of tool calls", where)
    return [_tool_call(call, f"{where}.{i}") for i, call in enumerate(listed)]


def _tool_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise refusal(f"{where} must be an object with a function", where)
    _refuse_extra(call, ("id", "index", "type", "function"), where, ())
    _refuse_extra(function, ("name", "arguments"), f"{where}.function", ())
    name, given, index = function.get("name"), call.get("id"), call.get("index")
    if not isinstance(name, str) or not name:
        raise refusal(f"{where}.function.name must be a string", f"{where}.function.name")
    if call.get("type") not in (None, "function"):
        raise refusal(f"{where}.type must be 'function'", f"{where}.type")
    if not isinstance(given, str | None):
        raise refusal(f"{where}.id must be a string", f"{where}.id")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
        raise refusal(f"{where}.index must be an integer", f"{where}.index")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    found: dict[str, Any] = {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return found if given is None else {"id": given} | found


def _arguments(arguments: object, where: str) -> dict[str, Any]:
    """Return the arguments of a call as an object, whose text is JSON."""
    found: object = arguments
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise refusal(f"{where} must be the JSON of an object ({error})", where) from None
    if not isinstance(found, Mapping | None):
        raise refusal(f"{where} must be an object, or its JSON", where)
    return dict(found or {})


def _refuse_extra(
    found: Mapping[Any, Any], served: Collection[str], where: str, idle: Collection[str] = UNSERVED
) -> None:
    """Refuse fields that are neither served nor, of the `idle` ones, ask for nothing."""
    extra = sorted(
        str(name)
        for name, value in found.items()
        if name not in served and not (name in idle and (value is None or value == []))
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
