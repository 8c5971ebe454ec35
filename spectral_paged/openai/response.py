"""Pieces of OpenAI's responses: choices, log-probabilities and usage of what a request returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectral_paged.outputs import CompletionOutput, Logprob, RequestOutput
from spectral_paged.sampling import SamplingParams


def token_counts(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of one response's prompts and completions."""
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    generated = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """OpenAI's `usage`: counts, and how many prompt tokens the prefix cache had."""
    cached = sum(o.metrics.num_cached_tokens for o in outputs)
    return token_counts(outputs) | {"prompt_tokens_details": {"cached_tokens": cached}}


def chat_choice(completion: CompletionOutput, params: SamplingParams) -> dict[str, Any]:
    """A choice of `chat.completion`."""
    choice = _choice(completion, {"message": {"role": "assistant", "content": completion.text}})
    if completion.logprobs is not None:
        choice["logprobs"] = chat_logprobs(completion.token_ids, completion.logprobs, params)
    return choice


def text_choice(completion: CompletionOutput) -> dict[str, Any]:
    """A choice of `text_completion`."""
    choice = _choice(completion, {"text": completion.text})
    if completion.logprobs is not None:
        choice["logprobs"] = text_logprobs(completion.token_ids, completion.logprobs)
    return choice


def _choice(completion: CompletionOutput, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": completion.index, "finish_reason": completion.finish_reason, **content}


def chat_logprobs(
    token_ids: Sequence[int], tables: Sequence[Mapping[int, Logprob]], params: SamplingParams
) -> dict[str, Any]:
    """One entry a token, each with as many top tokens as `params.logprobs` asks for."""
    num_top = params.logprobs or 0

    def entry(found: Logprob, token_id: int) -> dict[str, Any]:
        return {
            "token": found.decoded_token,
            "token_id": token_id,
            "logprob": found.logprob,
            "bytes": _bytes_of(found.decoded_token),
        }

    def top(table: Mapping[int, Logprob]) -> list[dict[str, Any]]:
        # the table has the drawn token too, whatever its rank
        ranked = sorted(table.items(), key=lambda item: item[1].rank)
        return [entry(found, token_id) for token_id, found in ranked[:num_top]]

    return {
        "content": [
            entry(table[token_id], token_id) | {"top_logprobs": top(table)}
            for token_id, table in zip(token_ids, tables, strict=True)
        ]
    }


def _bytes_of(text: str) -> list[int] | None:
    """UTF-8 of a token; None for a part of a character, whose bytes the text does not tell."""
    return None if "\ufffd" in text else list(text.encode())


def text_logprobs(
    token_ids: Sequence[int], tables: Sequence[Mapping[int, Logprob]], *, offset: int = 0
) -> dict[str, Any]:
    """The columns of a text completion.

    Args:
        offset: characters of tokens before these ones.
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
