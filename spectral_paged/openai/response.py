"""Pieces of OpenAI's responses: choices, log-probabilities and usage of a request's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectral_paged.outputs import CompletionOutput, Logprob, RequestOutput
from spectral_paged.sampling import SamplingParams


def token_counts(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return the token counts of one response's prompts and completions."""
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    generated = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return OpenAI's `usage`: token counts, and the prompt tokens that the prefix cache had."""
    cached = sum(o.metrics.num_cached_tokens for o in outputs)
    return token_counts(outputs) | {"prompt_tokens_details": {"cached_tokens": cached}}


def chat_choice(completion: CompletionOutput, params: SamplingParams) -> dict[str, Any]:
    """Return a completion as a choice of `chat.completion`."""
    choice = _choice(completion, {"message": {"role": "assistant", "content": completion.text}})
    if completion.logprobs is not None:
        choice["logprobs"] = chat_logprobs(completion.token_ids, completion.logprobs, params)
    return choice


def text_choice(completion: CompletionOutput) -> dict[str, Any]:
    """Return a completion as a choice of `text_completion`."""
    choice = _choice(completion, {"text": completion.text})
    if completion.logprobs is not None:
        choice["logprobs"] = text_logprobs(completion.token_ids, completion.logprobs)
    return choice


def _choice(completion: CompletionOutput, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": completion.index, "finish_reason": completion.finish_reason, **content}


def chat_logprobs(
    token_ids: Sequence[int], tables: Sequence[Mapping[int, Logprob]], params: SamplingParams
) -> dict[str, Any]:
    """Return `logprobs` of a chat choice: each token, with `params.logprobs` top tokens."""
    num_top = params.logprobs or 0

    def entry(found: Logprob, token_id: int) -> dict[str, Any]:
        return {
            "token": found.decoded_token,
            "token_id": token_id,
            "logprob": found.logprob,
            "bytes": _bytes_of(found.decoded_token),
        }

    def top(table: Mapping[int, Logprob]) -> list[dict[str, Any]]:
        # the table also has the sampled token, whatever its rank
        ranked = sorted(table.items(), key=lambda item: item[1].rank)
        return [entry(found, token_id) for token_id, found in ranked[:num_top]]

    return {
        "content": [
            entry(table[token_id], token_id) | {"top_logprobs": top(table)}
            for token_id, table in zip(token_ids, tables, strict=True)
        ]
    }


def _bytes_of(text: str) -> list[int] | None:
    """Return a token's UTF-8, or None for a part of a character, whose bytes are not known here."""
    return None if "\ufffd" in text else list(text.encode())


def text_logprobs(
    token_ids: Sequence[int], tables: Sequence[Mapping[int, Logprob]], *, offset: int = 0
) -> dict[str, Any]:
    """Return `logprobs` of a text choice, as columns over its tokens.

    Args:
        offset: number of characters of the tokens before these ones.
    """
    pairs = list(zip(token_ids, tables, strict=True))
    tokens = [table[token_id].decoded_token for token_id, table in pairs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [table[token_id].logprob for token_id, table in pairs],
        "top_logprobs": [
            {entry.decoded_token: entry.logprob for entry in table.values()} for _, table in pairs
        ],
        "text_offset": offsets,
    }
