"""The bodies of OpenAI's completions and chat completions: every field, its type and its default.

Names and meaning are those of OpenAI's API reference and of vLLM's additions. A field is served, or
describes the request and changes no answer, or is not served: then it may be null, or have the
value by which those APIs ask for nothing. Null stands for the default everywhere. Every other value
and name is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo
from pydantic_core import core_schema

from spectral_paged.engine import MESSAGES_SCHEMA, check_messages, check_salt
from spectral_paged.errors import EmptyPromptError, refusal, shown
from spectral_paged.openai.response_format import RESPONSE_FORMAT_SCHEMA, read_response_format
from spectral_paged.openai.strict import Strict
from spectral_paged.openai.tools import ToolChoice, Tools
from spectral_paged.sampling import RULES, RepetitionDetectionParams, StructuredOutputsParams

Prompt = str | list[int]
_NULL = {"type": "null"}


@dataclass(frozen=True)
class Checked:
    """Annotates a field whose values are checked by a function, and described by a JSON schema.

    Args:
        check: takes the value and the field's name; its result is the field's value.
        schema: the values that `check` takes.
    """

    check: Callable[[Any, str], Any]
    schema: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        def checked(value: Any, info: ValidationInfo) -> Any:
            return self.check(value, info.field_name or "")

        return core_schema.with_info_plain_validator_function(checked)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return dict(self.schema)


def sampled(parameter: str) -> Checked:
    """Return the annotation of a field that is a sampling parameter, by its own rule."""
    rule = RULES[parameter]

    def check(value: object, name: str) -> object:
        return None if value is None else rule.check(value, name)

    return Checked(check, {"anyOf": [rule.schema, _NULL]})


def unserved(*values: Any) -> Checked:
    """Return the annotation of a field that is not served: null, or one of `values`."""

    def check(value: object, name: str) -> None:
        if value is not None and not any(_is_same(value, one) for one in values):
            raise refusal(f"{name} is {shown(value)}, which is not supported: leave it out", name)

    return Checked(check, {"enum": [None, *values]})


def _is_same(value: object, other: object) -> bool:
    """Compare JSON values, of which false equals no 0."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return value == other


def _prompts(prompt: object, name: str) -> list[Prompt]:
    """Return a string, token ids, or a list of either as a list of prompts."""
    prompts: Any = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if prompts and all(isinstance(p, str) or _is_ids(p) for p in prompts):
        if "" in prompts:
            raise EmptyPromptError("the prompt is empty: give at least one token")
        return list(prompts)
    if prompt is None:
        raise refusal("a body needs a 'prompt'", name)
    if prompt == []:
        raise refusal("the prompt is empty: give at least one token", name)
    raise refusal("prompt must be a string, a list of token ids, or a list of those", name)


def _messages(messages: object, name: str) -> list[dict[str, Any]]:
    return check_messages(messages)


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )


def _salt(salt: object, name: str) -> str:
    return "" if salt is None else check_salt(salt)


_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer"}}
_PROMPT = [{"type": "string", "minLength": 1}, _IDS]
_PROMPTS = {"anyOf": [*_PROMPT, {"type": "array", "minItems": 1, "items": {"anyOf": _PROMPT}}]}


class StreamOptions(Strict):
    """What a stream has beside its pieces of text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's
    include_obfuscation: Annotated[None, unserved(False)] = None


class Unserved(Strict):
    """Fields of OpenAI's and vLLM's APIs that are not served."""

    # OpenAI's
    service_tier: Annotated[None, unserved("auto", "default")] = None
    store: Annotated[None, unserved(False)] = None
    # vLLM's
    ec_transfer_params: Annotated[None, unserved()] = None
    kv_transfer_params: Annotated[None, unserved()] = None
    length_penalty: Annotated[None, unserved(1)] = None
    priority: Annotated[None, unserved(0)] = None
    request_id: Annotated[None, unserved()] = None
    return_mm_kwargs: Annotated[None, unserved(True)] = None
    return_token_ids: Annotated[None, unserved(False)] = None
    return_token_offsets: Annotated[None, unserved(False)] = None
    return_tokens_as_token_ids: Annotated[None, unserved(False)] = None
    routed_experts_prompt_start: Annotated[None, unserved(0)] = None
    stream_interval: Annotated[None, unserved(1)] = None
    thinking_token_budget: Annotated[None, unserved(-1)] = None
    truncation_side: Annotated[None, unserved("left")] = None
    use_beam_search: Annotated[None, unserved(False)] = None
    vllm_xargs: Annotated[None, unserved({})] = None
    watermarking: Annotated[None, unserved(False)] = None


class Body(Unserved):
    """The fields that both kinds of bodies have."""

    model: str | None = None
    # sampling
    n: Annotated[int | None, sampled("n")] = None
    temperature: Annotated[float | None, sampled("temperature")] = None
    top_k: Annotated[int | None, sampled("top_k")] = None
    top_p: Annotated[float | None, sampled("top_p")] = None
    min_p: Annotated[float | None, sampled("min_p")] = None
    repetition_penalty: Annotated[float | None, sampled("repetition_penalty")] = None
    presence_penalty: Annotated[float | None, sampled("presence_penalty")] = None
    frequency_penalty: Annotated[float | None, sampled("frequency_penalty")] = None
    seed: Annotated[int | None, sampled("seed")] = None
    stop: Annotated[str | list[str] | None, sampled("stop")] = None
    stop_token_ids: Annotated[list[int] | None, sampled("stop_token_ids")] = None
    max_tokens: Annotated[int | None, sampled("max_tokens")] = None
    max_completion_tokens: Annotated[int | None, sampled("max_tokens")] = None  # wins over it
    min_tokens: Annotated[int | None, sampled("min_tokens")] = None
    ignore_eos: Annotated[bool | None, sampled("ignore_eos")] = None
    skip_special_tokens: Annotated[bool | None, sampled("skip_special_tokens")] = None
    spaces_between_special_tokens: Annotated[
        bool | None, sampled("spaces_between_special_tokens")
    ] = None
    include_stop_str_in_output: Annotated[bool | None, sampled("include_stop_str_in_output")] = None
    truncate_prompt_tokens: Annotated[int | None, sampled("truncate_prompt_tokens")] = None
    logit_bias: Annotated[dict[int, float] | None, sampled("logit_bias")] = None
    allowed_token_ids: Annotated[list[int] | None, sampled("allowed_token_ids")] = None
    bad_words: Annotated[list[str] | None, sampled("bad_words")] = None
    repetition_detection: Annotated[
        RepetitionDetectionParams | None, sampled("repetition_detection")
    ] = None
    prompt_logprobs: Annotated[int | None, sampled("prompt_logprobs")] = None
    logprob_token_ids: Annotated[list[int] | None, sampled("logprob_token_ids")] = None
    structured_outputs: Annotated[StructuredOutputsParams | None, sampled("structured_outputs")] = (
        None
    )
    response_format: Annotated[
        StructuredOutputsParams | None, Checked(read_response_format, RESPONSE_FORMAT_SCHEMA)
    ] = None
    # what is sent, and what is shared
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Checked(_salt, {"type": ["string", "null"]})] = ""
    # descriptions of the request, which change no answer
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None
    session_id: str | None = None


class CompletionRequest(Body):
    """The body of `/v1/completions`."""

    prompt: Annotated[list[Prompt], Checked(_prompts, _PROMPTS)]
    echo: bool | None = None
    logprobs: Annotated[int | None, sampled("logprobs")] = None
    # not served
    add_special_tokens: Annotated[None, unserved(True)] = None
    best_of: Annotated[None, unserved(1)] = None
    prompt_embeds: Annotated[None, unserved()] = None
    suffix: Annotated[None, unserved()] = None


class ChatCompletionRequest(Body):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Checked(_messages, MESSAGES_SCHEMA)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, sampled("logprobs")] = None
    add_generation_prompt: bool | None = None  # vLLM's, like the next two
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    # OpenAI's fields that are not served
    audio: Annotated[None, unserved()] = None
    function_call: Annotated[None, unserved("none", "auto")] = None
    functions: Annotated[None, unserved([])] = None
    modalities: Annotated[None, unserved(["text"])] = None
    moderation: Annotated[None, unserved()] = None
    prediction: Annotated[None, unserved()] = None
    prompt_cache_options: Annotated[None, unserved()] = None
    reasoning_effort: Annotated[None, unserved("none")] = None
    verbosity: Annotated[None, unserved("medium")] = None
    web_search_options: Annotated[None, unserved()] = None
    # vLLM's
    add_special_tokens: Annotated[None, unserved(False)] = None
    chat_template: Annotated[None, unserved()] = None
    documents: Annotated[None, unserved([])] = None
    echo: Annotated[None, unserved(False)] = None
    include_reasoning: Annotated[None, unserved(True)] = None
    media_io_kwargs: Annotated[None, unserved({})] = None
    mm_processor_kwargs: Annotated[None, unserved({})] = None
    return_prompt_text: Annotated[None, unserved(False)] = None
