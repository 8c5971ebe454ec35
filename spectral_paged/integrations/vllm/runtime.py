"""The cache that scheduler and worker of one vLLM process share, and the life of its open step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from spectral_paged.cache import SpectralKVCache, StepPlan
from spectral_paged.errors import NonFiniteError, PoolError
from spectral_paged.models.static_inputs import StaticInputs

Array = np.ndarray[Any, Any]
P = ParamSpec("P")
R = TypeVar("R")


class PagedRuntime:
    """What both halves of an engine process know of pages.

    Attributes:
        cache: the block manager.
        inputs: what captured decode steps read.
        failed: sequences whose blocks had NaN or Inf, until the scheduler ends their requests.
        room: bound on the page table entries of the graph that is captured now.
        num_blocks: page table entries that the step in the static inputs reads.
        serving: True when a scheduler is there, so that every batch is of its requests.
    """

    current: PagedRuntime | None = None  # of this process; a worker sets it, a scheduler reads it

    def __init__(self, cache: SpectralKVCache) -> None:
        self.cache = cache
        self.inputs = StaticInputs(cache)
        self.failed: dict[str, NonFiniteError] = {}
        self.room = self.num_blocks = 0
        self.serving = False
        self.num_steps = self.num_replays = 0
        self.host_seconds = self.wait_seconds = 0.0
        self.decode_host_seconds = 0.0
        self.num_decode_pairs = 0
        self._seconds_at_decode: float | None = None  # when the last step began, if it decoded
        self._in_step = False

    @classmethod
    def get(cls) -> PagedRuntime:
        """Return the runtime of this process.

        Raises:
            PoolError: no worker of this process has made one.
        """
        if cls.current is None:
            raise PoolError(
                "no cache of pages in this process: vLLM's scheduler and worker run apart, or "
                "worker_cls is not the one of engine_args"
            )
        return cls.current

    def knows(self, seq_ids: Sequence[str]) -> bool:
        """True for a batch of the scheduler's requests, False for one of vLLM's warm-up."""
        return self.serving or any(seq_id in self.cache for seq_id in seq_ids)

    def begin_step(self, seq_ids: Sequence[str], counts: list[int], starts: Array) -> StepPlan:
        """Open the step of these sequences.

        Args:
            counts: new tokens of each sequence.
            starts: tokens that vLLM believes to be stored.

        Raises:
            PoolError: vLLM and the cache disagree on the tokens stored.
        """
        plan = self.cache.plan(dict(zip(seq_ids, counts, strict=True)))
        for place in (plan.starts != starts).nonzero()[0].tolist():
            raise PoolError(
                f"vLLM counts {starts[place]} tokens stored of {seq_ids[place]!r}, the cache "
                f"counts {plan.starts[place]}"
            )
        self._count_decode(plan.is_decode)
        self.cache.begin_step(plan)
        self._in_step = True
        self.num_steps += 1
        return plan

    def _count_decode(self, decodes: bool) -> None:
        """Count the host's seconds from one decode step to the next, if none came between."""
        if decodes and self._seconds_at_decode is not None:
            self.decode_host_seconds += self.host_seconds - self._seconds_at_decode
            self.num_decode_pairs += 1
        self._seconds_at_decode = self.host_seconds if decodes else None

    def close_step(self) -> None:
        """End the open step, if there is one, and note the sequences that failed."""
        if self._in_step:
            self._in_step = False
            start = time.perf_counter()
            self.failed |= self.cache.settle().failed  # waits for the device to check its seals
            waited = time.perf_counter() - start
            self.wait_seconds += waited
            self.host_seconds -= waited  # `timed` counts the whole call
            self.failed |= self.cache.end_step().failed

    def settle(self) -> None:
        """Close the step, and note failures found since."""
        self.close_step()
        self.note_late_failures()

    def note_late_failures(self) -> None:
        """Note failures that a free has found; the sequences may be of other requests."""
        if self.cache.has_late_failures:
            self.failed |= self.cache.settle().failed

    def take_failed(self) -> dict[str, NonFiniteError]:
        """Return the failed sequences and forget them."""
        failed, self.failed = self.failed, {}
        return failed

    def stats(self) -> dict[str, object]:
        """Return the cache's figures, the steps run, and the host's seconds spent on pages.

        `host_seconds` is of all steps, without `wait_seconds`, in which the host waited for the
        device; `decode_host_ms` is the mean from one decode step to the next.
        """
        pairs = self.num_decode_pairs
        return {
            **self.cache.stats(),
            "num_steps": self.num_steps,
            "graph_replays": self.num_replays,
            "host_seconds": self.host_seconds,
            "wait_seconds": self.wait_seconds,
            "decode_host_ms": 1e3 * self.decode_host_seconds / pairs if pairs else None,
        }


def timed(function: Callable[P, R]) -> Callable[P, R]:
    """Count the seconds of a function, which calls none that is timed, in `host_seconds`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            PagedRuntime.get().host_seconds += time.perf_counter() - start

    return call
