"""Server-sent events as OpenAI sends them: `data: {...}` and, at the end, `data: [DONE]`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from spectral_paged.server.api_error import ApiError
from spectral_paged.server.body import while_connected

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends lists of chunks as they come.

    Args:
        chunks: its error becomes the last event, for the status has been sent.
        on_end: called once, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[list[dict[str, Any]]], on_end: Callable[[], None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks, self._on_end = chunks, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ApiError:
            pass  # the client has gone; `on_end` aborts what it asked for
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        )
        try:
            async for chunks in self._chunks:
                await _body(send, b"".join(map(_event, chunks)), more=True)
        except ApiError as error:
            await _body(send, _event(error.content), more=True)
        await _body(send, DONE, more=False)


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


async def _body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
