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
    """A timer adds up the seconds of the work inside `with timer:`.

    On CUDA, events mark the begin and the end on the stream, and are read once they have passed:
    neither timing nor reading waits for the device. Another thread reads the last known sum,
    because a query of an event there would break a CUDA graph that the timing thread captures.

    Args:
        device: the device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._begin: float | torch.cuda.Event = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._thread = 0

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._begin = self._mark()

    def __exit__(self, *_: object) -> None:
        begin, end = self._begin, self._mark()
        if isinstance(begin, float) and isinstance(end, float):
            self._seconds += end - begin
        elif isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._open.append((begin, end))
            self._take_passed()

    def _take_passed(self) -> None:
        while self._open and self._open[0][1].query():
            begin, end = self._open.popleft()
            self._seconds += begin.elapsed_time(end) / 1000

    @property
    def seconds(self) -> float:
        """The seconds of all work that has ended so far."""
        if threading.get_ident() == self._thread:
            self._take_passed()
        return self._seconds
