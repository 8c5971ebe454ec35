"""Request bodies are parsed into token ids and sampling values within the server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spectral_paged.engine import ChatOptions, check_request, most_tokens
from spectral_paged.errors import EmptyPromptError, InvalidRequestError, shown
from spectral_paged.llm import LLM
from spectral_paged.openai import OpenAIRequest, parse_body, parse_json
from spectral_paged.options import LoRARequest
from spectral_paged.sampling import SamplingParams, Wanted
from spectral_paged.server.api_error import ApiError
from spectral_paged.server.echo import Echo
from spectral_paged.server.served_names import lora_of
from spectral_paged.server.settings import ServerSettings

OF_TEMPLATE = tuple(ChatOptions.__annotations__)  # fields beside the messages


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A parsed and tokenized body.

    prompts: the token ids of each prompt.
    echoes: of each prompt, if the response repeats it.
    num_prompt_entries: log-probabilities of prompts in the response.
    lora: the adapter that the body names as its model.
    """

    body: OpenAIRequest
    prompts: list[list[int]]
    params: SamplingParams
    echoes: list[Echo] | None = None
    num_prompt_entries: int = 0
    lora: LoRARequest | None = None

    @property
    def num_completions(self) -> int:
        return len(self.prompts) * self.params.n


def parse_request(llm: LLM, settings: ServerSettings, raw: bytes, *, chat: bool) -> ParsedRequest:
    """Parse and tokenize a body; raises as `prepare` does."""
    return prepare(llm, settings, parse_json(raw), chat=chat)


def prepare(llm: LLM, settings: ServerSettings, value: object, *, chat: bool) -> ParsedRequest:
    """Read and tokenize a body that is parsed.

    Raises:
        SpectralPagedError: the request can never be served.
        ApiError: 404, the model is not served; 400, the request exceeds a limit of the server.
    """
    # by default a chat completion may use all the room there is, as OpenAI's may
    longest = {"max_tokens": llm.cache.max_model_len} if chat else {}
    body = parse_body(value, chat=chat, defaults=longest | llm.sampling_defaults)
    lora = lora_of(llm, settings, body.model)
    _check_limits(body, settings)
    if len(body.prompts) * body.params.n > settings.max_num_requests:
        raise ApiError(
            400,
            f"{len(body.prompts)} prompts with n {body.params.n} are more than the server's "
            f"{settings.max_num_requests} completions at once: send fewer at once",
            param="prompt",
            code="too_many_completions",
        )
    if body.tools is not None:
        tools = body.tools.bound(llm.get_tokenizer(), settings.tool_call_parser)
        body = replace(body, tools=tools, params=tools.params(body.params, llm.get_tokenizer()))
    options: ChatOptions = {**body.template}
    if body.tools is not None:
        options["tools"] = body.tools.tools
    encoder, keep = llm.engine.prompt_encoder, body.params.truncate_prompt_tokens
    try:
        prompts = (
            [
                encoder.encode_chat(
                    body.messages,
                    allow_special_tokens=llm.allow_special_tokens,
                    truncate_prompt_tokens=keep,
                    **options,
                )
            ]
            if body.messages is not None
            else [encoder.encode(prompt, truncate_prompt_tokens=keep) for prompt in body.prompts]
        )
        if not all(prompts):
            raise EmptyPromptError("the prompt is empty: give at least one token")
    except InvalidRequestError as error:
        if error.param not in OF_TEMPLATE:
            error.param = "messages" if chat else "prompt"
        raise
    echoes = None
    if body.echo:
        pairs = zip(body.prompts, prompts, strict=True)
        echoes = [Echo.of(llm, prompt, ids, body.params) for prompt, ids in pairs]
    num_entries = _prompt_entries(llm, body, prompts)
    params = _with_room(llm, settings, body, prompts, num_entries)
    for prompt in prompts:  # here, because the engine's thread would read each token of a long one
        engine = llm.engine
        check_request(llm.cache, prompt, params, (), engine.vocab_size, engine.max_logprobs)
    _check_size(llm, settings, prompts, params, num_entries)
    return ParsedRequest(body, prompts, params, echoes, num_entries, lora)


def entries_of_token(llm: LLM, wanted: Wanted | None) -> int:
    """Return 1 for a token, and 1 for each log-probability that comes with it."""
    if wanted is None:
        return 1
    return 2 + wanted.top(llm.engine.vocab_size or 0) + len(wanted.token_ids)


def _prompt_entries(llm: LLM, body: OpenAIRequest, prompts: Sequence[Sequence[int]]) -> int:
    """Return the entries of prompts with their log-probabilities; an echo is in every choice."""
    if body.params.wanted_of_prompt is None:
        return 0
    copies = body.params.n if body.messages is None else 1
    each = entries_of_token(llm, body.params.wanted_of_prompt)
    return copies * each * sum(map(len, prompts))


def _check_size(
    llm: LLM,
    settings: ServerSettings,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    num_prompt_entries: int,
) -> None:
    lengths = [len(prompt) for prompt in prompts]
    room = [most_tokens(llm.cache, length, params) - length for length in lengths]
    tokens = params.n * sum(room)
    per_token, most = entries_of_token(llm, params.wanted), settings.max_response_entries
    entries = tokens * per_token + num_prompt_entries
    if entries > most:
        each = "" if params.wanted is None else f" with {per_token - 1} log-probabilities"
        each += f", and {num_prompt_entries} entries of prompts" if num_prompt_entries else ""
        raise ApiError(
            400,
            f"the response may have {tokens} tokens (prompts times n times max_tokens){each}, "
            f"{entries} entries in all; this server allows {most}: ask for fewer completions, "
            "tokens or log-probabilities, or raise --max-response-entries",
            param="max_tokens" if params.wanted is None else "logprobs",
            code="response_too_large",
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
    for name in ("logit_bias", "allowed_token_ids"):
        rules = len(getattr(params, name) or ()) * max(1, len(body.prompts))
        if rules > settings.max_token_rules:
            raise ApiError(
                400,
                f"{name} has {rules} entries for all prompts; this server allows "
                f"{settings.max_token_rules}: send fewer prompts at once, or fewer tokens",
                param=name,
                code="too_many_token_rules",
            )
    if len(body.cache_salt) > settings.max_salt_chars:
        raise ApiError(
            400,
            f"a cache_salt may have {settings.max_salt_chars} characters",
            param="cache_salt",
            code="cache_salt_too_long",
        )


def _with_room(
    llm: LLM,
    settings: ServerSettings,
    body: OpenAIRequest,
    prompts: list[list[int]],
    num_prompt_entries: int,
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
        (settings.max_response_entries - num_prompt_entries)
        // (len(prompts) * body.params.n * entries_of_token(llm, body.params.wanted)),
    )
    # 1 without any room, so that the engine refuses the request
    return replace(body.params, max_tokens=max(1, min(asked, most)))
