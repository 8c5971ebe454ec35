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
    ForcedReader,
    TextChoice,
    ToolCall,
    ToolCallObject,
    ToolCallReader,
    ToolUse,
    Usage,
    call_object,
    chat_choice,
    chat_logprobs,
    counts,
    prompt_tables,
    text_choice,
    text_logprobs,
    usage,
)
from spectral_paged.outputs import CompletionOutput, RequestOutput, TextDelta
from spectral_paged.sampling import SamplingParams
from spectral_paged.server.echo import Echo
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
        echoes: of each prompt, put before its completions; None: no echo.
        returns_prompt_logprobs: the response has those of each prompt as a field of their own.
        tools: those that completions may call, in the model's form of calls.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        chat: bool,
        params: SamplingParams,
        num_prompt_tokens: Sequence[int],
        echoes: Sequence[Echo] | None = None,
        returns_prompt_logprobs: bool = False,
        tools: ToolUse | None = None,
    ) -> None:
        self._chat, self._params, self._echoes = chat, params, echoes
        self._returns_prompt_logprobs = returns_prompt_logprobs
        self._tools = tools
        self._readers: dict[int, ToolCallReader | ForcedReader] = {}  # of a stream, by choice
        self._num_calls: Counter[int] = Counter()
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
                yield from self._logprobs(completion, output, place)
                if not self._chat:
                    yield from self._prompt_logprobs(output)
                yield b"}"
                comma = ","
        yield b"]"
        if self._chat:
            yield from self._prompt_logprobs(outputs[0])
        yield f',"usage":{_json(usage(outputs))}}}'.encode()

    def _prompt_logprobs(self, output: RequestOutput) -> Iterator[bytes]:
        """Yield the JSON of the field `prompt_logprobs`, if the request asks for it."""
        if not self._returns_prompt_logprobs:
            return
        before, tables = b',"prompt_logprobs":[', output.prompt_logprobs or []
        for start in range(0, len(tables), TOKENS_AT_ONCE):
            part = _json(prompt_tables(tables[start : start + TOKENS_AT_ONCE]))
            yield before + part[1:-1].encode()
            before = b","
            time.sleep(0)  # gives up Python's lock
        yield b"]"

    def _logprobs(
        self, completion: CompletionOutput, output: RequestOutput, place: int
    ) -> Iterator[bytes]:
        """Yield the JSON of a choice's `logprobs`, an object of lists over its tokens."""
        if completion.logprobs is None:
            yield b"null"
            return
        all_ids, all_tables = completion.token_ids, completion.logprobs
        offsets, first = completion.text_offsets or [], ""
        if self._echoes is not None:
            echo, first = self._echoes[place], self._echoes[place].first
            all_ids = [*echo.token_ids, *all_ids]
            all_tables = [*(output.prompt_logprobs or ()), *all_tables]
            offsets = [*echo.offsets, *(len(echo.text) + offset for offset in offsets)]
        columns: dict[str, list[bytes]] = {}
        for start in range(0, max(1, len(all_ids)), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            ids, tables = all_ids[part], all_tables[part]
            found = (
                chat_logprobs(ids, tables, self._params)
                if self._chat
                else text_logprobs(ids, tables, offsets[part], first=first)
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
            return chat_choice(completion, self._params, self._tools)
        choice = text_choice(completion)
        if self._echoes is not None:
            choice["text"] = self._echoes[place].text + choice["text"]
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
        if self._params.prompt_logprobs is not None:
            return []  # they begin with the log-probabilities of their prompt
        return [self._text(i, self._echoes[i // self._num_choices].text) for i in choices]

    def _echo(self, item: TextDelta) -> list[dict[str, Any]]:
        """Return the echoes of a prompt with its log-probabilities, for all of its choices."""
        if self._echoes is None or item.prompt_logprobs is None:
            return []
        echo, first = self._echoes[item.prompt_index], item.prompt_index * self._num_choices
        found = None
        if self._params.wanted is not None:
            found = text_logprobs(
                echo.token_ids, item.prompt_logprobs, echo.offsets, first=echo.first
            )
        choices = range(first, first + self._num_choices)
        return [self._text(i, echo.text) | {"logprobs": found} for i in choices]

    def _pieces(self, item: TextDelta) -> list[dict[str, Any]]:
        index = item.prompt_index * self._num_choices + item.index
        self._num_generated[index] += len(item.token_ids)
        if not self._chat:
            piece = self._text(index, item.text, item.finish_reason)
            if item.logprobs is not None:
                shift = 0 if self._echoes is None else len(self._echoes[item.prompt_index].text)
                offsets = [shift + offset for offset in item.text_offsets or ()]
                piece["logprobs"] = text_logprobs(item.token_ids, item.logprobs, offsets)
            return [*self._echo(item), piece]
        reason = item.finish_reason
        text, calls = (item.text, []) if self._tools is None else self._divided(index, item)
        piece = self._delta(index, {"content": text})
        if item.logprobs is not None:
            piece["logprobs"] = chat_logprobs(item.token_ids, item.logprobs, self._params)
        found = [piece] if text or item.logprobs else []
        found += [self._delta(index, {"tool_calls": [call]}) for call in calls]
        if reason is not None:
            if self._tools is not None and self._num_calls[index]:
                reason = self._tools.finish_reason(reason)
            found.append(self._delta(index, {}, reason))
        return found

    def _divided(self, index: int, item: TextDelta) -> tuple[str, list[ToolCallObject]]:
        """Return the content and the tool calls that a piece of a choice's text decides."""
        assert self._tools is not None
        if index not in self._readers:
            self._readers[index] = self._tools.reader()
        items = self._readers[index].read(item.text, end=item.finish_reason is not None)
        calls: list[ToolCallObject] = []
        for call in items:
            if isinstance(call, ToolCall):
                calls.append({**call_object(call), "index": self._num_calls[index]})
                self._num_calls[index] += 1
        return "".join(text for text in items if isinstance(text, str)), calls

    def _delta(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _text(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
