"""How many completions may be in the server at once."""

from __future__ import annotations

from types import TracebackType

from spectral_paged.server.api_error import ApiError, no_room


class Seats:
    """Counts completions that run or wait; of one event loop, so it needs no lock."""

    def __init__(self, total: int, retry_seconds: int) -> None:
        self.total = total
        self.taken = 0
        self._retry_seconds = retry_seconds

    def take(self) -> Seat:
        """A request's first seat, to be used as a context.

        Raises:
            ApiError: 429, there is none.
        """
        seat = Seat(self)
        seat.grow(1)
        return seat

    def move(self, count: int) -> None:
        if count > self.total - self.taken:
            raise no_room(
                f"the server has {self.taken} of at most {self.total} completions in work: try "
                "again",
                code="too_many_requests",
                retry_seconds=self._retry_seconds,
            )
        self.taken += count


class Seat:
    """What one request holds; given back when its context ends."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._held = 0

    def grow(self, count: int) -> None:
        """Hold `count` seats.

        Raises:
            ApiError: 400, so many would never fit; 429, they do not fit now.
        """
        if count > self._seats.total:
            raise ApiError(
                400,
                f"the request asks for {count} completions (prompts times n); the server has room "
                f"for {self._seats.total}: send fewer at once",
                param="n",
                code="too_many_completions",
            )
        self._seats.move(count - self._held)
        self._held = count

    def __enter__(self) -> Seat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._seats.move(-self._held)
        self._held = 0
