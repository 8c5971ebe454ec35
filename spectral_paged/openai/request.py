"""Requests of OpenAI's API are read from JSON, for a batch line and a server alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spectral_paged.engine import ChatOptions
from spectral_paged.errors import InvalidRequestError, SpectralPagedError, cut, refusal, shown
from spectral_paged.openai.bodies import Body, ChatCompletionRequest, CompletionRequest, Prompt
from spectral_paged.openai.tools import ToolUse
from spectral_paged.sampling import SamplingParams

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
# what a line may name; the others are for callers of an engine
SAMPLING_FIELDS = tuple(
    f.name for f in fields(SamplingParams) if f.name not in ("logits_processors", "output_kind")
)
# fields that mean the same in a body as in `SamplingParams`
_OTHER = ("max_tokens", "logprobs", "prompt_logprobs")
_SAME = tuple(name for name in SAMPLING_FIELDS if name in Body.model_fields and name not in _OTHER)
Kind = TypeVar("Kind", bound=BaseModel)
# what a value must be, by the kind of pydantic's error
_WANTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
}


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A body with its defaults, with `messages` (chat) or `prompts` (completions) set.

    by_response_format: `response_format` asks for the structured outputs of `params`.
    template: what the body says of the chat template.
    named: sampling fields that the body has; `params` has the defaults of the others.
    include_usage: a stream ends with its usage.
    continuous_usage: each chunk of a stream has the usage so far.
    returns_prompt_logprobs: the answer has them as a field of their own, as in vLLM's API.
    """

    params: SamplingParams
    prompts: list[Prompt]
    messages: list[dict[str, Any]] | None = None
    tools: ToolUse | None = None
    template: ChatOptions = field(default_factory=ChatOptions)
    model: str | None = None
    cache_salt: str = ""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    returns_prompt_logprobs: bool = False
    by_response_format: bool = False
    named: frozenset[str] = frozenset()


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON, all of whose strings can be encoded.

    Raises:
        InvalidRequestError: `raw` is no JSON, is nested too deep, or has a lone surrogate.
    """
    try:
        text = raw.decode("utf-8-sig")  # json itself accepts UTF-16, and surrogates in UTF-8
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:  # nothing can encode an escaped lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"a string is not valid Unicode: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not JSON: {error}") from None
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON")


def read_body(kind: type[Kind], body: object) -> Kind:
    """Read the fields of a body of one kind.

    Raises:
        InvalidRequestError, SamplingParamsError: `error.param` names the field at fault.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError("body must be an object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _refused(error) from None


def parse_body(body: object, *, chat: bool, defaults: Mapping[str, Any]) -> OpenAIRequest:
    """Read a body of `/v1/chat/completions` (`chat`) or `/v1/completions`.

    Args:
        defaults: sampling values for fields that the body does not have.

    Raises:
        InvalidRequestError, SamplingParamsError: `error.param` names the field at fault.
    """
    asked: ChatCompletionRequest | CompletionRequest = (
        read_body(ChatCompletionRequest, body) if chat else read_body(CompletionRequest, body)
    )
    given = {name: getattr(asked, name) for name in _SAME} | _limits(asked)
    if asked.response_format is not None:
        if asked.structured_outputs is not None:
            raise refusal(
                "response_format and structured_outputs are both given: leave one out",
                "response_format",
            )
        given["structured_outputs"] = asked.response_format
    given = {name: value for name, value in given.items() if value is not None}
    include_usage, continuous_usage = _usage(asked)
    common: dict[str, Any] = {
        "params": SamplingParams.from_optional(**dict(defaults) | given),
        "model": asked.model,
        "cache_salt": asked.cache_salt,
        "stream": bool(asked.stream),
        "returns_prompt_logprobs": asked.prompt_logprobs is not None,
        "include_usage": include_usage,
        "continuous_usage": continuous_usage,
        "by_response_format": asked.response_format is not None,
        "named": frozenset(given),
    }
    if isinstance(asked, ChatCompletionRequest):
        tools = ToolUse.of(asked.tools or (), asked.tool_choice, asked.parallel_tool_calls)
        if tools is not None and tools.choice == "required" and "structured_outputs" in given:
            raise refusal(
                "tool_choice and another form of the answer are both given: leave one out",
                "tool_choice",
            )
        template = ChatOptions()
        if asked.add_generation_prompt is not None:
            template["add_generation_prompt"] = asked.add_generation_prompt
        if asked.continue_final_message is not None:
            template["continue_final_message"] = asked.continue_final_message
        if asked.chat_template_kwargs is not None:
            template["chat_template_kwargs"] = asked.chat_template_kwargs
        return OpenAIRequest(
            prompts=[], messages=asked.messages, tools=tools, template=template, **common
        )
    return OpenAIRequest(prompts=asked.prompt, echo=bool(asked.echo), **common)


def _limits(asked: ChatCompletionRequest | CompletionRequest) -> dict[str, int | None]:
    """Return limits and log-probabilities, which have other names or types in a body."""
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if asked.logprob_token_ids and (asked.logprobs is None or asked.logprobs is False):
        raise refusal("logprob_token_ids needs logprobs", "logprob_token_ids")
    if asked.prompt_logprobs is not None and asked.stream:
        message = "prompt_logprobs are no part of a stream: leave one of them out"
        raise refusal(message, "prompt_logprobs")
    if isinstance(asked, ChatCompletionRequest):
        if asked.top_logprobs and not asked.logprobs:
            raise refusal("top_logprobs needs logprobs to be true", "top_logprobs")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        of_prompt = asked.prompt_logprobs
    else:
        logprobs, of_prompt = asked.logprobs, asked.prompt_logprobs
        if asked.echo and of_prompt is None:
            of_prompt = logprobs
    if asked.logprob_token_ids:
        logprobs = None  # these tokens take the place of the most probable ones
    return {"max_tokens": most, "logprobs": logprobs, "prompt_logprobs": of_prompt}


def _usage(asked: Body) -> tuple[bool, bool]:
    """Return where a stream has its usage: at its end, and in each chunk, as in vLLM's API."""
    options = asked.stream_options
    if options is None or not options.model_fields_set:
        return False, False
    if not asked.stream:
        raise refusal("stream_options needs stream to be true", "stream_options")
    include = bool(options.include_usage)
    return include, include and bool(options.continuous_usage_stats)


def _refused(error: ValidationError) -> SpectralPagedError:
    """Return the error of a body's unknown fields, or else of its first wrong one."""
    found = error.errors(include_url=False)
    unknown = sorted(_place(one) for one in found if one["type"] == "extra_forbidden")
    if unknown:
        message = f"body fields {shown(unknown)} are not supported: leave them out"
        return refusal(message, unknown[0])
    first = found[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SpectralPagedError):
        if cause.param is None or len(first["loc"]) > 1:
            cause.param = _place(first)
        return cause
    if first["type"] == "missing":
        return refusal(f"a body needs {_place(first)!r}", _place(first))
    wanted = _WANTED.get(first["type"])
    rule = first["msg"] if wanted is None else f"it must be {wanted}"
    return refusal(f"{_place(first)} is {shown(first['input'])}; {rule}", _place(first))


def _place(error: ErrorDetails) -> str:
    """Return the path of a field, such as `stream_options.include_usage`."""
    return cut(".".join(map(str, error["loc"])))
