"""The limit on the number of completions that run or wait in the server."""

from __future__ import annotations

from types import TracebackType

from spectral_paged.server.api_error import ApiError, no_room


class ConcurrencyLimit:
    """Counts completions that run or wait. Only one event loop uses it, so it needs no lock."""

    def __init__(self, total: int, retry_seconds: int) -> None:
        self.total = total
        self.taken = 0
        self._retry_seconds = retry_seconds

    def lease(self) -> Lease:
        """Take room for a request's first completion, in a context that frees the request's room.

        Raises:
            ApiError: 429, there is no room.
        """
        lease = Lease(self)
        lease.grow(1)
        return lease

    def move(self, count: int) -> None:
        if count > self.total - self.taken:
            raise no_room(
                f"the server has {self.taken} of at most {self.total} completions in work: try "
                "again",
                code="too_many_requests",
                retry_seconds=self._retry_seconds,
            )
        self.taken += count


class Lease:
    """The room that one request has taken, freed when its context ends."""

    def __init__(self, limit: ConcurrencyLimit) -> None:
        self._limit = limit
        self._held = 0

    def grow(self, count: int) -> None:
        """Take room for `count` completions in all.

        Raises:
            ApiError: 400, so many never fit; 429, they do not fit now.
        """
        if count > self._limit.total:
            raise ApiError(
                400,
                f"the request asks for {count} completions (prompts times n); the server has room "
                f"for {self._limit.total}: send fewer at once",
                param="n",
                code="too_many_completions",
            )
        self._limit.move(count - self._held)
        self._held = count

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._limit.move(-self._held)
        self._held = 0
