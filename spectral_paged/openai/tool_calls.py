"""Tool calls are read from a model's text, piece by piece, in the form of its family.

```
hermes        text <tool_call>{"name": ..., "arguments": {...}}</tool_call> ...    Hermes, Qwen
llama3_json   {"name": ..., "parameters": {...}}; {...}                            Llama 3
mistral       text [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]            Mistral
              text [TOOL_CALLS]name{...}[TOOL_CALLS]name{...}
```

The names of forms are vLLM's. A call is given out when it is complete, so a stream and the whole
text have the same calls. Text that is no call after all is text. White space beside calls is left
out.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMS = ("hermes", "llama3_json", "mistral")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
MISTRAL = "[TOOL_CALLS]"
# what begins a call, wherever it stands in the text
MARKERS = {"hermes": OPEN, "llama3_json": PYTHON_TAG, "mistral": MISTRAL}
_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")
_BLANK = re.compile(r"\s*")
ANY_OBJECT = {"type": "object"}
_read_json = json.JSONDecoder().raw_decode


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; `arguments` is the JSON of an object."""

    id: str
    name: str
    arguments: str


def form_of(chat_template: object) -> str | None:
    """Return the form of calls that a chat template shows its model, or None."""
    text = str(chat_template)
    if MISTRAL in text:
        return "mistral"
    if OPEN in text:
        return None if "<function=" in text else "hermes"  # which has XML inside
    if PYTHON_TAG in text or "Environment: ipython" in text:
        return "llama3_json"
    return None


class ToolCallReader:
    """Divides a text that comes in pieces into content and tool calls.

    Args:
        form: of `FORMS`.
        parallel: False drops all calls but the first.
    """

    def __init__(self, form: str, *, parallel: bool = True) -> None:
        self._form, self._parallel = form, parallel
        self._held = ""  # text that is not decided yet
        self._blank = ""  # white space that a call may follow
        self._any_text = self._after_call = False
        self.num_calls = 0

    def read(self, piece: str, *, end: bool = False) -> list[str | ToolCall]:
        """Return the content and the calls that a further piece of the text decides.

        Args:
            end: the text ends with it.
        """
        self._held += piece
        found: list[str | ToolCall] = []
        for item in self._decided(end):
            if isinstance(item, ToolCall):
                self.num_calls += 1
                self._blank, self._after_call = "", True
                if self._parallel or self.num_calls == 1:
                    found.append(item)
            elif text := self._text(item):
                found.append(text)
        if end and self._blank and not self.num_calls:
            found.append(self._blank)
        return found

    def _text(self, text: str) -> str:
        """Return text without white space beside calls, which waits for what comes behind it."""
        text = self._blank + (text.lstrip() if self._after_call else text)
        core = text.rstrip()
        self._after_call = self._after_call and not core
        self._blank = text[len(core) :]
        return core

    def _decided(self, end: bool) -> Iterator[str | ToolCall]:
        while self._held:
            before, marked = self._cut(end)
            if before:
                self._any_text = self._any_text or bool(before.strip())
                self._held = self._held[len(before) :]
                yield before
            if not marked:
                return
            calls, length = self._calls(end)
            if length is None:
                return  # not complete yet
            text, self._held = self._held[:length], self._held[length:]
            if calls:
                yield from calls
            else:
                self._any_text = True
                yield text

    def _cut(self, end: bool) -> tuple[str, bool]:
        """Return the text before a call that may begin, and whether one does."""
        held, marker = self._held, MARKERS[self._form]
        at = held.find(marker)
        if self._form == "llama3_json" and not self._any_text:
            start = self._skip(0)
            first = held[start : start + 1]
            if first == "{" or (first == ";" and self.num_calls):
                return held[:start], True
        if at >= 0:
            return held[:at], True
        if end:
            return held, False
        size = next((n for n in range(len(marker) - 1, 0, -1) if held.endswith(marker[:n])), 0)
        return held[: len(held) - size], False

    def _calls(self, end: bool) -> tuple[list[ToolCall], int | None]:
        """Read the call that the held text begins with: calls, none of text that is no call, and
        the length of either; a length of None waits for more."""
        if self._form == "hermes":
            return self._hermes(end)
        if self._form == "mistral":
            return self._mistral(end)
        return self._llama(end)

    def _hermes(self, end: bool) -> tuple[list[ToolCall], int | None]:
        value, stop = self._json(len(OPEN))
        call = self._call(value)
        if stop is None:
            return ([], len(OPEN)) if end else ([], None)
        if call is None:
            return [], stop
        rest = self._held[self._skip(stop) :]
        if rest.startswith(CLOSE):
            return [call], self._skip(stop) + len(CLOSE)
        if end or not CLOSE.startswith(rest):
            return [call], stop  # a model may leave the end out
        return [], None

    def _mistral(self, end: bool) -> tuple[list[ToolCall], int | None]:
        start = self._skip(len(MISTRAL))
        if self._held[start : start + 1] != "[":
            name = _NAME.match(self._held, start)
            value, stop = self._json(name.end()) if name is not None else (None, None)
            if name is None or stop is None:
                return ([], len(MISTRAL)) if end else ([], None)
            call = self._call({"name": name[1], "arguments": value})
            return ([], stop) if call is None else ([call], stop)
        values, stop = self._json(start)
        if stop is None:
            return ([], len(MISTRAL)) if end else ([], None)
        calls = [self._call(value) for value in values]
        if not calls or None in calls:
            return [], stop
        return [call for call in calls if call is not None], stop

    def _llama(self, end: bool) -> tuple[list[ToolCall], int | None]:
        start = len(PYTHON_TAG) if self._held.startswith(PYTHON_TAG) else 0
        if self._held[start : start + 1] == ";" and self.num_calls:
            start += 1
        value, stop = self._json(start)
        if stop is None:
            return ([], max(start, 1)) if end else ([], None)
        call = self._call(value)
        return ([], stop) if call is None else ([call], stop)

    # ---- parts of the held text ------------------------------------------------------------

    def _skip(self, start: int) -> int:
        blank = _BLANK.match(self._held, start)
        return start if blank is None else blank.end()

    def _json(self, start: int) -> tuple[Any, int | None]:
        """Return the JSON at a place and where it stops; None: it is not complete, or none."""
        try:
            value, stop = _read_json(self._held, self._skip(start))
        except (ValueError, RecursionError):
            return None, None
        return value, stop

    def _call(self, value: Any) -> ToolCall | None:
        # templates of Mistral take no other ids than of 9 letters and digits
        return _call_of(value, uuid.uuid4().hex[:9] if self._form == "mistral" else _new_id())


class ForcedReader:
    """Reads a text that structured outputs held to be calls and nothing else.

    Args:
        name: of the function whose arguments the text is; None: the text is a list of calls.
    """

    def __init__(self, name: str | None, *, parallel: bool = True) -> None:
        self._name, self._parallel = name, parallel
        self._held = ""

    def read(self, piece: str, *, end: bool = False) -> list[str | ToolCall]:
        """Return the calls once the text has ended; a list that was cut short is text."""
        self._held += piece
        if not end:
            return []
        if self._name is not None:
            return [ToolCall(_new_id(), self._name, self._held)]
        try:
            calls = [_call_of(value, _new_id()) for value in json.loads(self._held)]
        except (ValueError, TypeError, RecursionError):
            return [self._held]
        found = [call for call in calls if call is not None]
        return [*found] if self._parallel else [*found[:1]]


def forced_schema(tools: Sequence[Mapping[str, Any]], name: str | None) -> dict[str, Any]:
    """Return the JSON schema of what `ForcedReader` reads.

    Args:
        tools: functions in OpenAI's form.
        name: of the only one that may be called; None: one or more of all.
    """
    functions = [tool["function"] for tool in tools]
    if name is not None:
        [chosen] = [f for f in functions if f["name"] == name]
        return dict(chosen.get("parameters") or ANY_OBJECT)
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "parameters": function.get("parameters") or ANY_OBJECT,
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}}


def _call_of(value: Any, call_id: str) -> ToolCall | None:
    """Return the call that a JSON value is, or None."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if not value["name"] or not isinstance(arguments, dict):
        return None
    return ToolCall(call_id, value["name"], json.dumps(arguments, ensure_ascii=False))


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
