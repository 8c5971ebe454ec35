"""The objects of OpenAI's responses: types of what is sent, from which the server is described."""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

closed = with_config(ConfigDict(extra="forbid"))


@closed
class PromptTokensDetails(TypedDict):
    """Prompt tokens that were not computed; of these `host_cached_tokens` came from host memory
    and `disk_cached_tokens` from disk, where any did."""

    cached_tokens: int
    host_cached_tokens: NotRequired[int]
    disk_cached_tokens: NotRequired[int]


@closed
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


@closed
class TokenLogprob(TypedDict):
    token: str
    token_id: int
    logprob: float
    bytes: list[int]


@closed
class ContentLogprob(TypedDict):
    token: str
    token_id: int
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


@closed
class ChatLogprobs(TypedDict):
    content: list[ContentLogprob]


@closed
class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@closed
class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id


@closed
class FunctionCall(TypedDict):
    name: str
    arguments: str


@closed
class ToolCallObject(TypedDict):
    """A call of a function; pieces of a stream say which one of several they belong to."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: NotRequired[int]


@closed
class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ToolCallObject]]


@closed
class ChatChoice(TypedDict):
    index: int
    finish_reason: str | None
    message: AssistantMessage
    logprobs: ChatLogprobs | None


@closed
class TextChoice(TypedDict):
    index: int
    finish_reason: str | None
    text: str
    logprobs: TextLogprobs | None
    prompt_logprobs: NotRequired[PromptLogprobs | None]


@closed
class ChatCompletion(TypedDict):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs | None]


@closed
class Completion(TypedDict):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


@closed
class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    tool_calls: list[ToolCallObject]


@closed
class DeltaChoice(TypedDict):
    index: int
    finish_reason: str | None
    delta: Delta
    logprobs: ChatLogprobs | None


@closed
class ChatCompletionChunk(TypedDict):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: NotRequired[Usage | None]


@closed
class CompletionChunk(TypedDict):
    """One event of a stream of text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


@closed
class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: NotRequired[str]  # of a LoRA adapter: the name of its model


@closed
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


@closed
class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


@closed
class ErrorResponse(TypedDict):
    """The answer of every request that fails, whatever its route."""

    error: ErrorDetail
