"""Reading a request's body: within its limit, in time, and only while somebody is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from spectral_paged.server.api_error import ApiError, disconnected

T = TypeVar("T")
DISCARD_SECONDS = 1.0
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def read_body(
    receive: Receive, headers: Any, *, limit: int, seconds: float
) -> bytes:
    """The bytes of a JSON body.

    Args:
        headers: of the request, lower-case names.
        limit: bytes.

    Raises:
        ApiError: 413, 415, or 408.
    """
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site cannot send this unasked
        raise ApiError(415, f"content-type is {kind!r:.80}; use application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        if "expect" not in headers:  # else nothing comes before it is asked for
            await _discard(receive, limit)
        raise _too_long(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise disconnected()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    await _discard(receive, limit)
                    raise _too_long(limit)
                if not message.get("more_body"):
                    return b"".join(parts)
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
