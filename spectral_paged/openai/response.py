"""Pieces of OpenAI's responses: choices, log-probabilities and usage of a request's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spectral_paged.openai.objects import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ContentLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    ToolCallObject,
    Usage,
)
from spectral_paged.openai.tool_calls import ToolCall
from spectral_paged.openai.tools import ToolUse
from spectral_paged.outputs import CompletionOutput, Logprob, RequestOutput
from spectral_paged.sampling import SamplingParams


def token_counts(outputs: Sequence[RequestOutput]) -> Usage:
    """Return the token counts of one response's prompts and completions."""
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    return counts(prompt, sum(len(c.token_ids) for o in outputs for c in o.outputs))


def counts(num_prompt: int, num_generated: int) -> Usage:
    """Return counts of tokens under OpenAI's names."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def usage(outputs: Sequence[RequestOutput]) -> Usage:
    """Return OpenAI's `usage`: token counts, and the prompt tokens that the prefix cache had."""
    details: PromptTokensDetails = {
        "cached_tokens": sum(o.metrics.num_cached_tokens for o in outputs)
    }
    if from_host := sum(o.metrics.num_host_cached_tokens for o in outputs):
        details["host_cached_tokens"] = from_host
    if from_disk := sum(o.metrics.num_disk_cached_tokens for o in outputs):
        details["disk_cached_tokens"] = from_disk
    return {**token_counts(outputs), "prompt_tokens_details": details}


def chat_choice(
    completion: CompletionOutput, params: SamplingParams, tools: ToolUse | None = None
) -> ChatChoice:
    """Return a completion as a choice of `chat.completion`.

    Args:
        tools: those that it may call, bound to the model's form of calls.
    """
    tables = completion.logprobs
    message: AssistantMessage = {"role": "assistant", "content": completion.text}
    reason = completion.finish_reason
    if tools is not None:
        items = tools.reader().read(completion.text, end=True)
        calls = [item for item in items if isinstance(item, ToolCall)]
        if calls:
            text = "".join(item for item in items if isinstance(item, str))
            message = {
                "role": "assistant",
                "content": text or None,
                "tool_calls": [call_object(call) for call in calls],
            }
            reason = tools.finish_reason(reason)
    return {
        "index": completion.index,
        "finish_reason": reason,
        "message": message,
        "logprobs": None if tables is None else chat_logprobs(completion.token_ids, tables, params),
    }


def call_object(call: ToolCall) -> ToolCallObject:
    """Return a tool call in OpenAI's form."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def text_choice(completion: CompletionOutput) -> TextChoice:
    """Return a completion as a choice of `text_completion`."""
    tables, places = completion.logprobs, completion.text_offsets or ()
    return {
        "index": completion.index,
        "finish_reason": completion.finish_reason,
        "text": completion.text,
        "logprobs": None if tables is None else text_logprobs(completion.token_ids, tables, places),
    }


def chat_logprobs(
    token_ids: Sequence[int], tables: Sequence[Mapping[int, Logprob]], params: SamplingParams
) -> ChatLogprobs:
    """Return `logprobs` of a chat choice: each token, with the top or given tokens asked for."""
    wanted = params.wanted

    def entry(found: Logprob, token_id: int) -> TokenLogprob:
        return {
            "token": found.decoded_token,
            "token_id": token_id,
            "logprob": found.logprob,
            "bytes": list(found.token_bytes),
        }

    def top(table: Mapping[int, Logprob]) -> list[TokenLogprob]:
        # the table also has the sampled token, whatever its rank
        ranked = sorted(table.items(), key=lambda item: item[1].rank)
        if wanted is None or wanted.token_ids:
            return [entry(found, token_id) for token_id, found in ranked]
        return [entry(found, token_id) for token_id, found in ranked[: wanted.top(len(ranked))]]

    content: list[ContentLogprob] = [
        {**entry(table[token_id], token_id), "top_logprobs": top(table)}
        for token_id, table in zip(token_ids, tables, strict=True)
    ]
    return {"content": content}


def text_logprobs(
    token_ids: Sequence[int],
    tables: Sequence[Mapping[int, Logprob] | None],
    offsets: Sequence[int],
    *,
    first: str = "",
) -> TextLogprobs:
    """Return `logprobs` of a text choice, as columns over its tokens.

    Args:
        tables: None for the first token of an echoed prompt.
        offsets: the place of each token in the text.
        first: the text of that first token.
    """
    found: TextLogprobs = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": list(offsets),
    }
    for token_id, table in zip(token_ids, tables, strict=True):
        names = {token_id: first} if table is None else _names(table)
        found["tokens"].append(names[token_id])
        found["token_logprobs"].append(None if table is None else table[token_id].logprob)
        found["top_logprobs"].append(
            None if table is None else {names[t]: entry.logprob for t, entry in table.items()}
        )
    return found


def prompt_tables(tables: Sequence[Mapping[int, Logprob] | None]) -> PromptLogprobs:
    """Return a prompt's log-probabilities in vLLM's form, keyed by token id."""
    return [
        None
        if table is None
        else {
            str(token_id): {
                "logprob": entry.logprob,
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in table.items()
        }
        for table in tables
    ]


def _names(table: Mapping[int, Logprob]) -> dict[int, str]:
    """Return a name of its own for each token of a table, by token id.

    That is its text, `bytes:\\xc3` for a part of a character or what has the text of a more
    probable token, and `token_id:5` for what has its bytes too.
    """
    found: dict[str, int] = {}
    for token_id, entry in sorted(table.items(), key=lambda item: item[1].rank):
        data = entry.token_bytes
        spelled = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        names = [spelled, f"token_id:{token_id}"] if data else [f"token_id:{token_id}"]
        if data and data == entry.decoded_token.encode():
            names.insert(0, entry.decoded_token)
        found[next(name for name in names if name not in found)] = token_id
    return {token_id: name for name, token_id in found.items()}
