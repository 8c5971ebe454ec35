"""How long a device works on something, without anybody waiting for it."""

from __future__ import annotations

import threading
import time
from collections import deque

import torch


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
