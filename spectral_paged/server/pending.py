"""The outputs that one HTTP request gets from the engine's thread while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from spectral_paged.engine import TextDeltas
from spectral_paged.outputs import RequestOutput, TextDelta

News = TextDelta | RequestOutput


class Generation:
    """The running prompts of one HTTP request.

    Iterating yields lists of what arrived since the last one: pieces of text if the request
    streams, and the output of each finished prompt. The iterator raises the request's error.

    Attributes:
        places: the prompt's index by its request id in the engine.
        deltas: cuts outputs into pieces; None: only finished outputs are yielded.
    """

    def __init__(
        self, request_ids: Sequence[str], deltas: TextDeltas | None, on_close: Callable[[], None]
    ) -> None:
        self.places = {request_id: place for place, request_id in enumerate(request_ids)}
        self.deltas = deltas
        self._on_close = on_close
        self._left = len(request_ids)
        self._news: list[News] = []
        self._error: BaseException | None = None
        self._something = asyncio.Event()

    # ---- the engine's thread -------------------------------------------------------------

    def news_of(self, output: RequestOutput) -> list[News]:
        """Return the pieces and the finished output to send, none of which changes later."""
        place = self.places[output.request_id]
        found: list[News] = [] if self.deltas is None else list(self.deltas.of(output, place))
        return [*found, output] if output.finished else found

    # ---- the event loop ------------------------------------------------------------------

    def receive(self, news: Sequence[News]) -> None:
        self._news.extend(news)
        self._something.set()

    def fail(self, error: BaseException) -> None:
        """End the request with an error, after the pieces that arrived before it."""
        self._error = self._error or error
        self._something.set()

    async def __aiter__(self) -> AsyncIterator[list[News]]:
        while self._left:
            await self._something.wait()
            self._something.clear()
            news, self._news = self._news, []
            self._left -= sum(isinstance(item, RequestOutput) for item in news)
            if news:
                yield news
            if self._error is not None:
                raise self._error

    async def outputs(self) -> list[RequestOutput]:
        """Wait for the finished outputs and return them in prompt order.

        Raises:
            ApiError: a prompt failed, or the server stops.
        """
        found: dict[int, RequestOutput] = {}
        async for news in self:
            for item in news:
                if isinstance(item, RequestOutput):
                    found[self.places[item.request_id]] = item
        return [found[place] for place in sorted(found)]

    def close(self) -> None:
        """Abort running prompts; may be called more than once."""
        self._on_close()
