"""Where a step's time goes, measured only where somebody asked."""

from __future__ import annotations

import time
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
