"""The body of `/v1/responses`, which is read as a conversation, and its objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from spectral_paged.errors import refusal, shown
from spectral_paged.openai.bodies import Checked, sampled, unserved
from spectral_paged.openai.objects import closed
from spectral_paged.openai.strict import Strict
from spectral_paged.openai.tools import MAX_TOOLS

RESPONSES_URL = "/v1/responses"
# fields of a body and what they are in that of a conversation; errors name them the other way
SAME = ("model", "temperature", "top_p", "stream", "metadata", "user", "cache_salt", "seed")
RENAMED = {"max_output_tokens": "max_tokens", "parallel_tool_calls": "parallel_tool_calls"}
TEXT_PARTS = ("input_text", "output_text", "text")
_ITEMS: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "object"}},
    ]
}


def _input(value: object, name: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return value
    raise refusal(f"{name} must be text, or a list of items, and not empty", name)


class TextFormat(Strict):
    """The form of the text: `text`, `json_object`, or a schema by `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Annotated[None, unserved("medium")] = None


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Strict):
    type: Literal["function"]
    name: str


class ResponsesRequest(Strict):
    """The body of `/v1/responses`. Nothing is stored, so each has its whole conversation."""

    model: str | None = None
    input: Annotated[str | list[dict[str, Any]], Checked(_input, _ITEMS)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, sampled("max_tokens")] = None
    temperature: Annotated[float | None, sampled("temperature")] = None
    top_p: Annotated[float | None, sampled("top_p")] = None
    seed: Annotated[int | None, sampled("seed")] = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # not served
    background: Annotated[None, unserved(False)] = None
    conversation: Annotated[None, unserved()] = None
    include: Annotated[None, unserved([])] = None
    max_tool_calls: Annotated[None, unserved()] = None
    previous_response_id: Annotated[None, unserved()] = None
    prompt: Annotated[None, unserved()] = None
    reasoning: Annotated[None, unserved()] = None
    service_tier: Annotated[None, unserved("auto", "default")] = None
    store: Annotated[None, unserved(False)] = None
    stream_options: Annotated[None, unserved()] = None
    top_logprobs: Annotated[None, unserved(0)] = None
    truncation: Annotated[None, unserved("disabled")] = None

    def chat_body(self) -> dict[str, Any]:
        """Return the body of the conversation that this one asks to continue.

        Raises:
            InvalidRequestError: an item is none that is served; `error.param` is its place.
        """
        body: dict[str, Any] = {name: getattr(self, name) for name in SAME}
        body |= {chat: getattr(self, name) for name, chat in RENAMED.items()}
        body["messages"] = self._messages()
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, NamedFunctionTool):
            named = {"name": self.tool_choice.name}
            body["tool_choice"] = {"type": "function", "function": named}
        else:
            body["tool_choice"] = self.tool_choice
        form = None if self.text is None else self.text.format
        if form is not None:
            body["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                schema = {"name": form.name, "schema": form.schema_}
                body["response_format"]["json_schema"] = schema
        return body

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for i, item in enumerate(self.input):
            message = _message(item, f"input.{i}")
            if "tool_calls" in message and found and found[-1]["role"] == "assistant":
                calls = found[-1].setdefault("tool_calls", [])
                calls.extend(message["tool_calls"])  # several items of one answer
            else:
                found.append(message)
        return found


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an item of the input as a message."""
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": _parts(item.get("content"), where)}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        content = _parts(item.get("output"), where)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    raise refusal(f"{where}.type is {shown(kind)}, which is not supported", f"{where}.type")


def _parts(content: object, where: str) -> object:
    """Return text, or text parts under the name that they have in messages."""
    if not isinstance(content, list):
        return content
    found = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
            raise refusal(f"{where}.content has {shown(part)}; models here read text only", where)
        found.append({"type": "text", "text": part.get("text")})
    return found


# ---- objects ------------------------------------------------------------------------------


@closed
class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[str]


@closed
class OutputMessage(TypedDict):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: str
    content: list[OutputText]


@closed
class OutputCall(TypedDict):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


@closed
class InputTokensDetails(TypedDict):
    cached_tokens: int


@closed
class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


@closed
class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


@closed
class IncompleteDetails(TypedDict):
    reason: str


class ResponseObject(TypedDict):
    """The answer of `/v1/responses`; it repeats what the body asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    error: None
    incomplete_details: IncompleteDetails | None
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage | None
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[dict[str, Any]]
    store: NotRequired[bool]
