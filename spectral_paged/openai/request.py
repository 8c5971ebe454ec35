"""The bodies of OpenAI's completions and chat completions, from a batch line or a server.

Fields and meaning are those of the API reference, vLLM's extra sampling fields included. An
unsupported field that would change the completion is refused. Descriptive fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from spectral_paged.engine import check_messages, check_salt
from spectral_paged.errors import InvalidRequestError, SpectralPagedError, refusal, shown
from spectral_paged.sampling import SamplingParams

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
# fields that mean the same in a body as in `SamplingParams`
_SAME = tuple(name for name in SAMPLING_FIELDS if name not in ("max_tokens", "logprobs"))
_MAX_TOKENS = ("max_tokens", "max_completion_tokens")  # the second wins if both are given
_DESCRIBING = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
# values that leave any field at its default
_NO_WISH: tuple[Any, ...] = (None, False, [], {}, {"type": "text"}, ["text"], "none")
Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A parsed body, with `messages` (chat) or `prompts` (completions) set.

    named: sampling fields that the body has; `params` has the defaults of the others.
    """

    params: SamplingParams
    prompts: list[Prompt]
    messages: list[dict[str, str]] | None = None
    model: str | None = None
    cache_salt: str = ""
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    named: frozenset[str] = frozenset()


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON, all of whose strings can be encoded.

    Raises:
        InvalidRequestError: `raw` is no JSON, is nested too deep, or has a lone surrogate.
    """
    try:
        text = raw.decode("utf-8-sig")  # json itself accepts UTF-16, and surrogates in UTF-8
        value = json.loads(text)
        if "\\u" in text:  # nothing can encode an escaped lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"a string is not valid Unicode: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not JSON: {error}") from None
    return value


def parse_body(body: object, *, chat: bool, defaults: Mapping[str, Any]) -> OpenAIRequest:
    """Read a body of `/v1/chat/completions` (`chat`) or `/v1/completions`.

    Args:
        defaults: sampling values for fields that the body does not have.

    Raises:
        InvalidRequestError, SamplingParamsError: `error.param` names the field at fault.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError("body must be an object")
    known = {*_SAME, *_MAX_TOKENS, *_DESCRIBING, "logprobs", "model", "stream", "stream_options"}
    known |= {"cache_salt"}  # as in vLLM
    known |= {"top_logprobs", "messages"} if chat else {"prompt", "echo"}
    extra = sorted(k for k in body if k not in known and _asks(body[k]))
    if extra:
        raise refusal(f"body fields {shown(extra)} are not supported: leave them out", extra[0])
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise refusal("model must be a string", "model")
    stream = _flag(body, "stream")
    echo = _flag(body, "echo")
    given = _sampling(body, chat)
    if echo and given.get("logprobs") is not None:
        raise refusal("echo with logprobs is not supported: prompts have no logprobs", "echo")
    try:
        params = SamplingParams(**dict(defaults) | given)
        salt = body.get("cache_salt")
        salt = "" if salt is None else check_salt(salt)
    except SpectralPagedError as error:
        error.param = error.param or "cache_salt"
        raise
    return OpenAIRequest(
        params,
        prompts=[] if chat else _prompts(body.get("prompt")),
        messages=check_messages(body.get("messages")) if chat else None,
        model=model,
        cache_salt=salt,
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream),
        echo=echo,
        named=frozenset(given),
    )


def _asks(value: object) -> bool:
    """True if a value differs from those of `_NO_WISH`; 0 does, though it equals False."""
    return not any(type(value) is type(none) and value == none for none in _NO_WISH)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise refusal(f"{name} must be true or false", name)
    return bool(value)


def _sampling(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    given = {name: body[name] for name in _SAME if body.get(name) is not None}
    for name in _MAX_TOKENS:
        if body.get(name) is not None:
            given["max_tokens"] = body[name]
    logprobs = body.get("logprobs")
    if not chat:
        if logprobs is not None:
            given["logprobs"] = logprobs
        return given
    wanted = _flag(body, "logprobs")
    if body.get("top_logprobs") is not None:
        if not wanted and body["top_logprobs"] != 0:
            raise refusal("top_logprobs needs logprobs to be true", "top_logprobs")
        if wanted:
            given["logprobs"] = body["top_logprobs"]
    elif wanted:
        given["logprobs"] = 0
    return given


def _include_usage(options: object, stream: bool) -> bool:
    """True if a stream ends with its usage. As in OpenAI's API, options need a stream."""
    if options in (None, {}):
        return False
    if not isinstance(options, dict):
        raise refusal("stream_options must be an object", "stream_options")
    extra = sorted(k for k, v in options.items() if k != "include_usage" and v)
    if extra:
        raise refusal(f"stream_options {shown(extra)} are not supported", "stream_options")
    if not stream:
        raise refusal("stream_options needs stream to be true", "stream_options")
    return _flag(options, "include_usage")


def _prompts(prompt: object) -> list[Prompt]:
    """Return a string, token ids, or a list of either as a list of prompts."""
    prompts: Any = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if prompts and all(isinstance(p, str) or _is_ids(p) for p in prompts):
        return list(prompts)
    if prompt is None:
        raise refusal("a body needs a 'prompt'", "prompt")
    if prompt == []:
        raise refusal("the prompt is empty: give at least one token", "prompt")
    raise refusal("prompt must be a string, a list of token ids, or a list of those", "prompt")


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )
