"""uvicorn with a shutdown in two phases: requests may finish, then they are aborted."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from spectral_paged.errors import missing_extra
from spectral_paged.server.app import Service

try:
    import uvicorn
except ImportError as error:
    raise missing_extra("the server needs the package uvicorn", "server") from error

BACKSTOP_SECONDS = 5  # for responses to leave after the grace time, before connections are closed


class HttpServer(uvicorn.Server):
    """Serves one `Service` until SIGINT or SIGTERM.

    After the signal the server stops listening. Running requests continue for
    `settings.grace_seconds`, then they are aborted with a 503. A second signal aborts them at
    once. Signals are not raised again, so that the process returns its exit status.

    Args:
        on_ready: called when the server accepts requests.
    """

    def __init__(self, service: Service, on_ready: Callable[[], None] = lambda: None) -> None:
        self._service, self._on_ready = service, on_ready
        self._grace = service.settings.grace_seconds
        super().__init__(
            uvicorn.Config(
                service.app,
                http="h11",  # httptools, where it is installed, reads headers of any length
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(self._grace + BACKSTOP_SECONDS),
                lifespan="on",
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.begin_to_stop()
        ending = asyncio.create_task(self._end_all())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_all(self) -> None:
        """Abort running requests after the grace time, or at a second signal."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace
        while loop.time() < deadline and len(self._captured_signals) < 2:
            await asyncio.sleep(0.05)
        self._service.end_all()

    async def on_tick(self, counter: int) -> bool:
        if self._service.engine.died:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._captured_signals.append(sig)
        self.should_exit = True
