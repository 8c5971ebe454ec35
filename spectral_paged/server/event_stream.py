"""Server-sent events in OpenAI's format: `data: {...}` and, at the end, `data: [DONE]`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from spectral_paged.server.api_error import ApiError
from spectral_paged.server.request_body import while_connected

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends lists of chunks as they arrive.

    Args:
        chunks: an `ApiError` of the iterator becomes the last event, because the status is sent.
        on_end: called once, also after an error.
        named: events have their type as a name, and none ends the stream, as those of responses.
        seconds: a client that receives nothing for so long, with all buffers full, counts as
            disconnected.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[list[dict[str, Any]]],
        on_end: Callable[[], None],
        *,
        seconds: float,
        named: bool = False,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks, self._on_end, self._seconds = chunks, on_end, seconds
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(self._in_time(send)))
        except (ApiError, TimeoutError):
            pass  # the client has disconnected; `on_end` aborts its request
        finally:
            self._on_end()

    def _in_time(self, send: Send) -> Send:
        async def bounded(message: Message) -> None:
            async with asyncio.timeout(self._seconds):
                await send(message)

        return bounded

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunks in self._chunks:
                names = [_name(chunk) if self._named else b"" for chunk in chunks]
                events = map(bytes.__add__, names, map(_event, chunks))
                await _body(send, b"".join(events), more=True)
        except ApiError as error:
            await _body(send, _event(error.content), more=True)
        await _body(send, b"" if self._named else DONE, more=False)


def _name(chunk: Mapping[str, Any]) -> bytes:
    return f"event: {chunk['type']}\n".encode()


def _event(chunk: Mapping[str, Any]) -> bytes:
    # ASCII, because some clients take U+2028 and similar characters for line ends
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def _body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
