"""OpenAI's objects for one HTTP request: the whole response, or the chunks of a stream."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from spectral_paged.openai import (
    ChatChoice,
    TextChoice,
    Usage,
    chat_choice,
    chat_logprobs,
    counts,
    text_choice,
    text_logprobs,
    usage,
)
from spectral_paged.outputs import CompletionOutput, RequestOutput, TextDelta
from spectral_paged.sampling import SamplingParams
from spectral_paged.server.pending import Generation

TOKENS_AT_ONCE = 64
_json = partial(json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class OpenAIResponse:
    """Builds the objects that respond to one request.

    Args:
        request_id: the id without the prefix `chatcmpl` or `cmpl`.
        model: the model's name in the response.
        params: the request's sampling parameters.
        num_prompt_tokens: of each prompt.
        echoes: the text of each prompt, put before its completions; None: no echo.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        chat: bool,
        params: SamplingParams,
        num_prompt_tokens: Sequence[int],
        echoes: Sequence[str] | None = None,
    ) -> None:
        self._chat, self._params, self._echoes = chat, params, echoes
        self._num_choices = params.n
        self._num_prompt_tokens = num_prompt_tokens
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        self._num_generated: Counter[int] = Counter()  # tokens of a stream so far, by choice

    def pieces(self, outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        """Yield the JSON of the response without a stream; choices are numbered across all prompts.

        Log-probabilities become JSON a few tokens at a time, and other threads run in between.
        """
        kind = "chat.completion" if self._chat else "text_completion"
        yield f'{_json(self._head | {"object": kind})[:-1]},"choices":['.encode()
        comma = ""
        for place, output in enumerate(outputs):
            for completion in output.outputs:
                choice = self._choice(replace(completion, logprobs=None), place)
                choice["index"] += place * self._num_choices
                bare = {name: value for name, value in choice.items() if name != "logprobs"}
                yield f'{comma}{_json(bare)[:-1]},"logprobs":'.encode()
                yield from self._logprobs(completion)
                yield b"}"
                comma = ","
        yield f'],"usage":{_json(usage(outputs))}}}'.encode()

    def _logprobs(self, completion: CompletionOutput) -> Iterator[bytes]:
        """Yield the JSON of a choice's `logprobs`, an object of lists over its tokens."""
        if completion.logprobs is None:
            yield b"null"
            return
        columns: dict[str, list[bytes]] = {}
        for start in range(0, max(1, len(completion.token_ids)), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            ids, tables = completion.token_ids[part], completion.logprobs[part]
            found = (
                chat_logprobs(ids, tables, self._params)
                if self._chat
                else text_logprobs(ids, tables, (completion.text_offsets or ())[part])
            )
            for name, values in found.items():
                text = ("," if start else "") + _json(values)[1:-1]
                columns.setdefault(name, []).append(text.encode())
            time.sleep(0)  # gives up Python's lock
        before = "{"
        for name, parts in columns.items():
            yield f'{before}"{name}":['.encode()
            yield from parts
            yield b"]"
            before = ","
        yield b"}"

    def _choice(self, completion: CompletionOutput, place: int) -> ChatChoice | TextChoice:
        if self._chat:
            return chat_choice(completion, self._params)
        choice = text_choice(completion)
        if self._echoes is not None:
            choice["text"] = self._echoes[place] + choice["text"]
        return choice

    async def chunks(
        self, generation: Generation, *, include_usage: bool, continuous_usage: bool = False
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the chunks of a stream, in lists of those that arrived together.

        Args:
            include_usage: the last chunk has the usage of the request, the others null.
            continuous_usage: the others have the tokens of their choice so far, as in vLLM's API.
        """

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            made = self._chunk([choice])
            if include_usage:
                made["usage"] = self._so_far(choice["index"]) if continuous_usage else None
            return made

        outputs = []
        yield [chunk(choice) for choice in self._beginnings(len(generation.places))]
        async for news in generation:
            found = []
            for item in news:
                if isinstance(item, RequestOutput):
                    outputs.append(item)
                else:
                    found += [chunk(choice) for choice in self._pieces(item)]
            yield found
        if include_usage:
            yield [self._chunk([]) | {"usage": usage(outputs)}]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": choices}

    def _so_far(self, index: int) -> Usage:
        """Return the usage of one choice."""
        prompt = self._num_prompt_tokens[index // self._num_choices]
        return counts(prompt, self._num_generated[index])

    def _beginnings(self, num_prompts: int) -> list[dict[str, Any]]:
        """Return the choices before the first token: the role in chat, or the echo."""
        choices = range(num_prompts * self._num_choices)
        if self._chat:
            return [self._delta(i, {"role": "assistant", "content": ""}) for i in choices]
        if self._echoes is None:
            return []
        return [self._text(i, self._echoes[i // self._num_choices]) for i in choices]

    def _pieces(self, item: TextDelta) -> list[dict[str, Any]]:
        index = item.prompt_index * self._num_choices + item.index
        self._num_generated[index] += len(item.token_ids)
        if not self._chat:
            piece = self._text(index, item.text, item.finish_reason)
            if item.logprobs is not None:
                piece["logprobs"] = text_logprobs(
                    item.token_ids, item.logprobs, item.text_offsets or ()
                )
            return [piece]
        piece = self._delta(index, {"content": item.text})
        if item.logprobs is not None:
            piece["logprobs"] = chat_logprobs(item.token_ids, item.logprobs, self._params)
        found = [piece] if item.text or item.logprobs else []
        if item.finish_reason is not None:
            found.append(self._delta(index, {}, item.finish_reason))
        return found

    def _delta(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _text(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
