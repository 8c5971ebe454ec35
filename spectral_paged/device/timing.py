"""Clocks: a step's time by section, and how long a device works on something."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

SECTIONS = ("schedule", "commit", "model", "attention", "sample", "seal")


class StepClock:
    """Seconds by section, each without what runs in a section inside of it.

    ```
    schedule -> commit -> model [ attention ... ] -> commit [ seal ] -> sample
    ```

    A clock that is off costs nothing. One that is on waits for the device at every border of a
    section, so that work is counted where it was asked for; a run is slower for it. What a CUDA
    graph replays is one piece: its attention counts as `model`.

    Args:
        device: what to wait for; None measures nothing.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    def section(self, name: str) -> AbstractContextManager[None]:
        """Count what runs inside as `name`."""
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
        """Give the time since the last border to the innermost open section."""
        if self._device is not None and self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class DeviceTimer:
    """Adds up the seconds of what runs inside `with timer:`.

    On CUDA events mark where it begins and ends on the stream, and are read once they have passed:
    neither timing nor reading waits for the device. Another thread may read and sees what was known
    last: asking an event there would break a CUDA graph that the timing thread captures meanwhile.

    Args:
        device: where the work runs.
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
        """What has ended so far."""
        if threading.get_ident() == self._thread:
            self._take_passed()
        return self._seconds
