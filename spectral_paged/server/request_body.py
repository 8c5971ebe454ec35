"""A request's body is read within limits of bytes and time, while its client is connected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from spectral_paged.errors import shown
from spectral_paged.server.api_error import ApiError, disconnected, no_room

T = TypeVar("T")
DISCARD_SECONDS = 1.0
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class BodyRoom:
    """Counts the bytes of all bodies that arrive or wait for the parser.

    Only one event loop uses it, so it needs no lock.

    Args:
        limit: the most bytes of one body.
        total: the most bytes of all bodies.
    """

    def __init__(self, limit: int, total: int, retry_seconds: int) -> None:
        self.limit, self.total, self.retry_seconds = limit, total, retry_seconds
        self.taken = 0


class Body:
    """The received bytes of one body.

    Received bytes take room, and announced ones do not, because a few clients that announce much
    and send nothing would take all of it.
    """

    def __init__(self, room: BodyRoom) -> None:
        self.room = room
        self.data = bytearray()

    def add(self, part: bytes) -> None:
        """Append a part.

        Raises:
            ApiError: 413, the body is too long; 429, there is no room now.
        """
        room = self.room
        if len(self.data) + len(part) > room.limit:
            raise _too_long(room.limit)
        if len(part) > room.total - room.taken:
            raise no_room(
                f"bodies that arrive have {room.taken} of at most {room.total} bytes: try again",
                code="too_many_body_bytes",
                retry_seconds=room.retry_seconds,
                Connection="close",
            )
        room.taken += len(part)
        self.data += part

    def drop(self) -> None:
        """Free the bytes and their room; may be called more than once."""
        self.room.taken -= len(self.data)
        self.data = bytearray()  # a new one, because the parser's thread may read the old one


async def read_body(receive: Receive, headers: Any, body: Body, *, seconds: float) -> None:
    """Read a JSON body.

    Args:
        headers: the request's headers, with lower-case names.
        seconds: the time for the whole body, also of a client that sends a byte now and then.

    Raises:
        ApiError: 408, it takes too long; 413, it is too long; 415, it is no JSON by its type; 429,
            there is no room now; 499, the client has disconnected.
    """
    limit = body.room.limit
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # which browsers let no other site send without permission
        raise ApiError(415, f"content-type is {shown(kind)}; use application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        if "expect" not in headers:  # such a client sends nothing before a 100 Continue
            await _discard(receive, limit)
        raise _too_long(limit)
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise disconnected()
                more = message.get("more_body", False)
                try:
                    body.add(message.get("body", b""))
                except ApiError:
                    body.drop()  # before the rest is discarded, because others need the room
                    if more:
                        await _discard(receive, limit)
                    raise
                if not more:
                    return
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive in {seconds:g} seconds", headers={"Connection": "close"}
        ) from None


async def _discard(receive: Receive, most: int) -> None:
    """Receive and drop up to `most` bytes, for a second.

    A client that sends its whole body before it reads would otherwise get a broken connection
    instead of the response.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while most > 0:
                message = await receive()
                if not message.get("more_body"):  # the end, or the client has disconnected
                    return
                most -= len(message.get("body", b""))


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {limit} bytes: send less, or raise --max-body-bytes",
        code="body_too_long",
        headers={"Connection": "close"},
    )


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled if the client disconnects.

    Raises:
        ApiError: 499, the client has disconnected.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise disconnected()
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
