"""What one HTTP request gets from the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from spectral_paged.engine import TextDeltas
from spectral_paged.outputs import RequestOutput, TextDelta

News = TextDelta | RequestOutput


class Generation:
    """The prompts of one request while they run. Iterating yields lists of news, what came since
    the last: pieces of text if it streams, and the output of each prompt that has finished.

    Its iterator raises the error that the request ended with.

    Attributes:
        places: the prompt's place by its request id in the engine.
        deltas: cuts outputs into pieces; None: only finished outputs are wanted.
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
        """What is to be told of an output, nothing of which changes any more."""
        place = self.places[output.request_id]
        found: list[News] = [] if self.deltas is None else list(self.deltas.of(output, place))
        return [*found, output] if output.finished else found

    # ---- the event loop ------------------------------------------------------------------

    def receive(self, news: Sequence[News]) -> None:
        self._news.extend(news)
        self._something.set()

    def fail(self, error: BaseException) -> None:
        """End the request; what came before is still told."""
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
        """The finished outputs, in prompt order.

        Raises:
            ApiError: one of them failed, or the server stops.
        """
        found: dict[int, RequestOutput] = {}
        async for news in self:
            for item in news:
                if isinstance(item, RequestOutput):
                    found[self.places[item.request_id]] = item
        return [found[place] for place in sorted(found)]

    def close(self) -> None:
        """Abort what still runs; may be called more than once."""
        self._on_close()
