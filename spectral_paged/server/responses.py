"""Objects and events of `/v1/responses`, made of the outputs of one conversation."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from spectral_paged.llm import LLM
from spectral_paged.openai import (
    ForcedReader,
    ResponsesRequest,
    ToolCall,
    ToolCallReader,
    ToolUse,
    parse_json,
    read_body,
    usage,
)
from spectral_paged.outputs import RequestOutput
from spectral_paged.server.api_error import ApiError
from spectral_paged.server.parsing import ParsedRequest, prepare
from spectral_paged.server.pending import Generation
from spectral_paged.server.settings import ServerSettings

# what errors of a conversation name, as the body has it
FIELDS = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}


def parse_response(
    llm: LLM, settings: ServerSettings, raw: bytes
) -> tuple[ResponsesRequest, ParsedRequest]:
    """Parse and tokenize a body.

    Raises:
        SpectralPagedError: the request can never be served.
        ApiError: 404, the model is not served; 400, the request exceeds a limit of the server.
    """
    asked = read_body(ResponsesRequest, parse_json(raw))
    return asked, prepare(llm, settings, asked.chat_body(), chat=True)


def renamed(error: ApiError) -> ApiError:
    """Return an error whose field is the body's own."""
    if error.param is not None:
        first, dot, rest = error.param.partition(".")
        error.param = f"{FIELDS.get(first, first)}{dot}{rest}"
    return error


class _Reader:
    """Reads a text without tools: all of it is content."""

    def read(self, piece: str, *, end: bool = False) -> list[str | ToolCall]:
        return [piece] if piece else []


class ResponsesResponse:
    """Builds the object of one response, or the events of its stream.

    Args:
        request_id: the id without the prefix `resp`.
        model: the model's name in the response.
        asked: the body, parts of which the response repeats.
        tools: those that the model may call, in its form of calls.
    """

    def __init__(
        self, request_id: str, model: str, asked: ResponsesRequest, tools: ToolUse | None
    ) -> None:
        self._id = request_id
        self._tools = tools
        self._output: list[dict[str, Any]] = []
        self._number = -1  # of the last event
        self._head: dict[str, Any] = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "user": asked.user,
        }
        if asked.text is not None and asked.text.format is not None:
            form = asked.text.format.model_dump(by_alias=True, exclude_none=True)
            self._head["text"] = {"format": form}
        if isinstance(asked.tool_choice, str):
            self._head["tool_choice"] = asked.tool_choice
        elif asked.tool_choice is not None:
            self._head["tool_choice"] = asked.tool_choice.model_dump()

    def pieces(self, outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        """Yield the JSON of the response without a stream."""
        [output] = outputs
        [completion] = output.outputs
        for item in self._reader().read(completion.text, end=True):
            list(self._events_of(item))
        yield json.dumps(self._whole(output)).encode()

    async def chunks(self, generation: Generation) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the events of a stream, in lists of those that arrived together."""
        started = self._object("in_progress")
        yield [
            self._event("response.created", response=started),
            self._event("response.in_progress", response=started),
        ]
        reader = self._reader()
        async for news in generation:
            events: list[dict[str, Any]] = []
            for item in news:
                if isinstance(item, RequestOutput):
                    events.extend(self._close())
                    whole = self._whole(item)
                    events.append(self._event(f"response.{whole['status']}", response=whole))
                else:
                    for part in reader.read(item.text, end=item.finish_reason is not None):
                        events.extend(self._events_of(part))
            yield events

    def _reader(self) -> ToolCallReader | ForcedReader | _Reader:
        return _Reader() if self._tools is None else self._tools.reader()

    # ---- objects -------------------------------------------------------------------------

    def _object(self, status: str, **more: Any) -> dict[str, Any]:
        nothing: dict[str, Any] = {"incomplete_details": None, "output": [], "usage": None}
        return self._head | {"status": status} | nothing | more

    def _whole(self, output: RequestOutput) -> dict[str, Any]:
        list(self._close())
        cut = output.outputs[0].finish_reason == "length"
        status = "incomplete" if cut else "completed"
        counted = usage([output])
        counts = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": counted["prompt_tokens_details"]["cached_tokens"]
            },
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted["total_tokens"],
        }
        details = {"reason": "max_output_tokens"} if cut else None
        return self._object(
            status, incomplete_details=details, output=list(self._output), usage=counts
        )

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _events_of(self, item: str | ToolCall) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece of text or of a call, and keep what they add."""
        if isinstance(item, ToolCall):
            yield from self._close()
            yield from self._call(item)
            return
        if not (self._output and self._is_open(self._output[-1])):
            yield from self._open()
        message = self._output[-1]
        message["content"][0]["text"] += item
        place = self._place(message) | {"content_index": 0}
        yield self._event("response.output_text.delta", delta=item, logprobs=[], **place)

    def _is_open(self, item: dict[str, Any]) -> bool:
        return bool(item["status"] == "in_progress")

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._output) - 1}

    def _open(self) -> Iterator[dict[str, Any]]:
        """Begin a message."""
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        message = {
            "type": "message",
            "id": f"msg_{self._id}_{len(self._output)}",
            "role": "assistant",
            "status": "in_progress",
            "content": [part],
        }
        self._output.append(message)
        place = self._place(message)
        yield self._event(
            "response.output_item.added",
            output_index=place["output_index"],
            item=message | {"content": []},
        )
        yield self._event("response.content_part.added", content_index=0, part=dict(part), **place)

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the message that is open, if one is."""
        if not (self._output and self._is_open(self._output[-1])):
            return
        message = self._output[-1]
        message["status"] = "completed"
        part, place = message["content"][0], self._place(message) | {"content_index": 0}
        yield self._event("response.output_text.done", text=part["text"], logprobs=[], **place)
        yield self._event("response.content_part.done", part=part, **place)
        index = place["output_index"]
        yield self._event("response.output_item.done", output_index=index, item=message)

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        item = {
            "type": "function_call",
            "id": f"fc_{self._id}_{len(self._output)}",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        self._output.append(item)
        place = self._place(item)
        index = place["output_index"]
        begun = item | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", delta=call.arguments, **place)
        yield self._event(f"{kind}.done", arguments=call.arguments, name=call.name, **place)
        yield self._event("response.output_item.done", output_index=index, item=item)
