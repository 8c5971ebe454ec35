"""Clocks measure a step's seconds by section and the seconds that a device works."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

SECTIONS = ("schedule", "commit", "model", "attention", "sample", "seal")


class StepClock:
    """Seconds by section; the time of an inner section does not count for the outer one.

    ```
    schedule -> commit -> model [ attention ... ] -> commit [ seal ] -> sample
    ```

    A clock that is off costs nothing. One that is on waits for the device at every border of a
    section, so that work counts in the section that queued it; the run becomes slower. A replayed
    CUDA graph is one piece: its attention counts as `model`.

    Args:
        device: the device to wait for; None measures nothing.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    def section(self, name: str) -> AbstractContextManager[None]:
        """Count the time inside the `with` as section `name`."""
        return nullcontext() if self._device is None else self._counted(name)

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Add the time since the last border to the innermost open section."""
        if self._device is not None and self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class DeviceTimer:
    """A timer adds up the seconds between the begin and the end of the work inside `with timer:`.

    On CUDA, events mark both on the stream, and are read once they have passed: neither timing nor
    reading waits for the device. Where the device has nothing left to do while the host still
    queues the work, the seconds between the events hold its waiting for the host as well. The
    timer therefore counts apart what waiting there can be at most.

    Another thread reads the last known sums, because a query of an event there would break a CUDA
    graph that the timing thread captures.

    Args:
        device: the device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = self._waiting = 0.0
        self._began = 0.0  # the host's clock
        self._begin: torch.cuda.Event | None = None
        # the events of each piece of work that has not ended yet, and how long the host queued it
        # while the device had nothing else to do
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event, float]] = deque()
        self._thread = 0

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        if self._on_cuda:
            self._begin = _event_now()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        queued = time.perf_counter() - self._began
        begin, self._begin = self._begin, None
        if begin is None:
            self._seconds += queued
            return
        caught_up = begin.query()  # before the end was queued
        self._open.append((begin, _event_now(), queued if caught_up else 0.0))
        self._take_passed()

    def _take_passed(self) -> None:
        while self._open and self._open[0][1].query():
            begin, end, queued = self._open.popleft()
            seconds = begin.elapsed_time(end) / 1000
            self._seconds += seconds
            self._waiting += min(seconds, queued)

    def _known(self) -> tuple[float, float]:
        if threading.get_ident() == self._thread:
            self._take_passed()
        return self._seconds, self._waiting

    @property
    def seconds(self) -> float:
        """The seconds of all work that has ended so far."""
        return self._known()[0]

    @property
    def waiting_seconds(self) -> float:
        """How many of `seconds` the device waited for the host, at most; 0 on a CPU."""
        return self._known()[1]


def _event_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
