"""Request bodies are parsed into token ids and sampling values within the server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spectral_paged.engine import check_request, most_tokens
from spectral_paged.errors import EmptyPromptError, InvalidRequestError, shown
from spectral_paged.llm import LLM
from spectral_paged.openai import OpenAIRequest, parse_body, parse_json
from spectral_paged.sampling import SamplingParams
from spectral_paged.server.api_error import ApiError
from spectral_paged.server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A parsed and tokenized body.

    prompts: the token ids of each prompt.
    echoes: the text of each prompt, if the response repeats it.
    """

    body: OpenAIRequest
    prompts: list[list[int]]
    params: SamplingParams
    echoes: list[str] | None = None

    @property
    def num_completions(self) -> int:
        return len(self.prompts) * self.params.n


def parse_request(llm: LLM, settings: ServerSettings, raw: bytes, *, chat: bool) -> ParsedRequest:
    """Parse and tokenize a body.

    Raises:
        SpectralPagedError: the request can never be served.
        ApiError: 404, the model is not served; 400, the request exceeds a limit of the server.
    """
    # by default a chat completion may use all the room there is, as OpenAI's may
    longest = {"max_tokens": llm.cache.max_model_len} if chat else {}
    body = parse_body(parse_json(raw), chat=chat, defaults=longest | llm.sampling_defaults)
    if body.model is not None and body.model not in settings.model_names:
        raise unknown_model(body.model, settings)
    _check_limits(body, settings)
    if len(body.prompts) * body.params.n > settings.max_num_requests:
        raise ApiError(
            400,
            f"{len(body.prompts)} prompts with n {body.params.n} are more than the server's "
            f"{settings.max_num_requests} completions at once: send fewer at once",
            param="prompt",
            code="too_many_completions",
        )
    encoder, keep = llm.engine.prompt_encoder, body.params.truncate_prompt_tokens
    try:
        prompts = (
            [
                encoder.encode_chat(
                    body.messages,
                    allow_special_tokens=llm.allow_special_tokens,
                    truncate_prompt_tokens=keep,
                )
            ]
            if body.messages is not None
            else [encoder.encode(prompt, truncate_prompt_tokens=keep) for prompt in body.prompts]
        )
        if not all(prompts):
            raise EmptyPromptError("the prompt is empty: give at least one token")
    except InvalidRequestError as error:
        error.param = "messages" if chat else "prompt"
        raise
    echoes = None
    if body.echo:
        echoes = [_echo(llm, prompt, body.params) for prompt in body.prompts]
    params = _with_room(llm, settings, body, prompts)
    for prompt in prompts:  # here, because the engine's thread would read each token of a long one
        check_request(llm.cache, prompt, params, (), llm.engine.vocab_size)
    _check_size(llm, settings, prompts, params)
    return ParsedRequest(body, prompts, params, echoes)


def entries_of_token(params: SamplingParams) -> int:
    """Return 1 for a token, and 1 for each log-probability that comes with it."""
    return 1 if params.logprobs is None else 2 + params.logprobs


def _check_size(
    llm: LLM, settings: ServerSettings, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> None:
    lengths = [len(prompt) for prompt in prompts]
    room = [most_tokens(llm.cache, length, params) - length for length in lengths]
    tokens = params.n * sum(room)
    entries, most = tokens * entries_of_token(params), settings.max_response_entries
    if entries > most:
        each = "" if params.logprobs is None else f" with {params.logprobs + 1} log-probabilities"
        raise ApiError(
            400,
            f"the response may have {tokens} tokens (prompts times n times max_tokens){each}, "
            f"{entries} entries in all; this server allows {most}: ask for fewer completions, "
            "tokens or log-probabilities, or raise --max-response-entries",
            param="max_tokens" if params.logprobs is None else "logprobs",
            code="response_too_large",
        )


def _echo(llm: LLM, prompt: str | Sequence[int], params: SamplingParams) -> str:
    """Return the text of a prompt, which its completion's text goes on from."""
    if isinstance(prompt, str):
        return prompt
    if llm.engine.token_bytes is None:
        raise InvalidRequestError("echo of token ids needs a tokenizer; send text")
    return llm.engine.token_bytes.text(prompt, skip_special_tokens=params.skip_special_tokens)


def unknown_model(name: str, settings: ServerSettings) -> ApiError:
    return ApiError(
        404,
        f"model {shown(name)} is not served here: this server has "
        f"{', '.join(map(repr, settings.model_names))}",
        param="model",
        code="model_not_found",
    )


def _check_limits(body: OpenAIRequest, settings: ServerSettings) -> None:
    params, most = body.params, settings.max_tokens
    if most is not None and "max_tokens" in body.named and (params.max_tokens or 0) > most:
        raise ApiError(
            400,
            f"max_tokens is {shown(params.max_tokens)}; this server allows {most}",
            param="max_tokens",
            code="max_tokens_too_large",
        )
    for name, values in (("stop", params.stop_strings), ("stop_token_ids", params.stop_token_ids)):
        if len(values) > settings.max_stops:
            raise ApiError(
                400,
                f"{name} has {len(values)} entries; this server allows {settings.max_stops}",
                param=name,
                code="too_many_stops",
            )
    if any(len(stop) > settings.max_stop_chars for stop in params.stop_strings):
        raise ApiError(
            400,
            f"a stop string may have {settings.max_stop_chars} characters",
            param="stop",
            code="stop_too_long",
        )
    if len(body.cache_salt) > settings.max_salt_chars:
        raise ApiError(
            400,
            f"a cache_salt may have {settings.max_salt_chars} characters",
            param="cache_salt",
            code="cache_salt_too_long",
        )


def _with_room(
    llm: LLM, settings: ServerSettings, body: OpenAIRequest, prompts: list[list[int]]
) -> SamplingParams:
    """Return the parameters, with `max_tokens` from the room there is if the body has no limit."""
    if "max_tokens" in body.named:
        return body.params
    asked = body.params.max_tokens or llm.cache.max_model_len
    most = asked if settings.max_tokens is None else settings.max_tokens
    if body.messages is not None:
        most = min(most, llm.cache.max_sequence_tokens - len(prompts[0]))
    most = min(
        most,
        settings.max_response_entries
        // (len(prompts) * body.params.n * entries_of_token(body.params)),
    )
    # 1 without any room, so that the engine refuses the request
    return replace(body.params, max_tokens=max(1, min(asked, most)))
