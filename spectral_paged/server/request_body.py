"""Reading a request's body: within its limit, in time, and only while somebody is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from spectral_paged.server.api_error import ApiError, disconnected, no_room

T = TypeVar("T")
DISCARD_SECONDS = 1.0
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class BodyRoom:
    """Counts the bytes of all bodies that arrive or wait for the parser; of one event loop, so it
    needs no lock.

    Args:
        limit: most bytes of one body.
        total: most bytes of all of them.
    """

    def __init__(self, limit: int, total: int, retry_seconds: int) -> None:
        self.limit, self.total, self.retry_seconds = limit, total, retry_seconds
        self.taken = 0


class Body:
    """One body. What has come takes room, not what is announced: else a few clients that send
    nothing would hold all of it."""

    def __init__(self, room: BodyRoom) -> None:
        self.room = room
        self.data = bytearray()

    def add(self, part: bytes) -> None:
        """One more part.

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
        """Give the bytes and their room back; may be called more than once."""
        self.room.taken -= len(self.data)
        self.data = bytearray()  # a new one: the parser's thread may be reading the old


async def read_body(receive: Receive, headers: Any, body: Body, *, seconds: float) -> None:
    """Read a JSON body.

    Args:
        headers: of the request, lower-case names.
        seconds: for all of it: a client that sends a byte now and then has no more.

    Raises:
        ApiError: 413, 415, 429, or 408.
    """
    limit = body.room.limit
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site cannot send this unasked
        raise ApiError(415, f"content-type is {kind!r:.80}; use application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        if "expect" not in headers:  # else nothing comes before it is asked for
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
                    body.drop()  # now: others need the room
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
    """Take what is on its way, up to `most` bytes and for a second: a client that writes all before
    it reads would find the connection broken instead of an answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while most > 0:
                message = await receive()
                if not message.get("more_body"):  # the end, or nobody is there
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
    """The result of `work`, which is cancelled when the client goes.

    Raises:
        ApiError: 499, it has gone.
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
