"""Counters of an engine: steps, tokens, requests by finish reason, and latencies in seconds."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spectral_paged.engine.requests import Completion

FINISH_REASONS = ("stop", "length", "repetition", "abort", "error")
# seconds; the bounds are vLLM's, so that one dashboard reads both
FIRST_TOKEN_BOUNDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
INTER_TOKEN_BOUNDS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
REQUEST_BOUNDS = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram of durations in seconds.

    counts: `counts[i]` durations are at most `bounds[i]` and above `bounds[i - 1]`; the last count
        is of those above every bound.
    total: the sum of all durations.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """Return the seconds that `share` of the durations stay below, interpolated in a bucket.

        None: there are no durations. Infinity: the quantile lies above the last bound.
        """
        below = np.cumsum(self.counts)
        if not below[-1]:
            return None
        wanted = share * below[-1]
        place = bisect_left(below.tolist(), wanted)
        if place == len(self.bounds):
            return float("inf")
        start = self.bounds[place - 1] if place else 0.0
        before = int(below[place]) - self.counts[place]
        part = (wanted - before) / max(self.counts[place], 1)
        return start + part * (self.bounds[place] - start)


class Durations:
    """Durations in seconds, appended to a list and sorted into buckets once the list is long.

    `append` is the list's own method, because the engine calls it for every token. Another thread
    may read.
    """

    FOLD_AT = 4096

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = np.zeros(len(self._bounds) + 1, dtype=np.int64)
        self._total = 0.0
        self._fresh: list[float] = []
        self._lock = threading.Lock()
        self.append = self._fresh.append

    def fold_if_long(self) -> None:
        """Sort the list into buckets if it is long. The engine calls this once a step."""
        if len(self._fresh) >= self.FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        with self._lock:
            count = len(self._fresh)  # durations appended after this line wait for the next fold
            taken = np.array(self._fresh[:count])
            del self._fresh[:count]
            places = np.searchsorted(self._bounds, taken)
            self._counts += np.bincount(places, minlength=len(self._counts))
            self._total += float(taken.sum())

    def distribution(self) -> Distribution:
        self._fold()
        with self._lock:
            return Distribution(self._bounds, tuple(self._counts.tolist()), self._total)


@dataclass(slots=True)
class DraftCounters:
    """Drafts of next tokens, totals since construction.

    excluded_requests: requests without drafts, because the host runs what says their next token.
    accepted_per_pos: accepted tokens by their place in the draft.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    excluded_requests: int = 0
    accepted_per_pos: list[int] = field(default_factory=lambda: [0])

    def count(self, num_tokens: int, num_accepted: int) -> None:
        """Count a draft of which the first `num_accepted` tokens came true."""
        self.drafts += 1
        self.draft_tokens += num_tokens
        self.accepted_tokens += num_accepted
        for place in range(num_accepted):
            self.accepted_per_pos[place] += 1

    def stats(self) -> dict[str, object]:
        """Return the counts under vLLM's names."""
        places = {str(place): count for place, count in enumerate(self.accepted_per_pos)}
        return {
            "spec_decode_num_drafts": self.drafts,
            "spec_decode_num_draft_tokens": self.draft_tokens,
            "spec_decode_num_accepted_tokens": self.accepted_tokens,
            "spec_decode_num_accepted_tokens_per_pos": places,
            "spec_decode_num_excluded_requests": self.excluded_requests,
        }


@dataclass(slots=True)
class EngineCounters:
    """Totals since construction.

    A request's prompt counts once, whatever `n`, when its first token arrives. Tokens that a
    preempted request recomputes or finds cached again are not counted as prompt tokens.
    """

    steps: int = 0
    lockstep_steps: int = 0  # steps whose tokens were fetched before the next step was queued
    steps_out_of_memory: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(  # completions by finish reason
        default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0)
    )
    refused: dict[str, int] = field(default_factory=dict)  # requests by the error's name
    drafts: DraftCounters = field(default_factory=DraftCounters)
    time_to_first_token: Durations = field(default_factory=lambda: Durations(FIRST_TOKEN_BOUNDS))
    inter_token_latency: Durations = field(default_factory=lambda: Durations(INTER_TOKEN_BOUNDS))
    request_latency: Durations = field(default_factory=lambda: Durations(REQUEST_BOUNDS))

    def count_token(self, completion: Completion, now: float) -> None:
        """Count a token that a completion gets at `now`, in seconds of the metrics' clock."""
        self.generated_tokens += 1
        if completion.token_time is not None:
            self.inter_token_latency.append(now - completion.token_time)
        completion.token_time = now
        group, metrics = completion.owner, completion.owner.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            metrics.num_cached_tokens = completion.request.num_cached_tokens
            metrics.num_host_cached_tokens = completion.request.num_host_cached_tokens
            metrics.num_disk_cached_tokens = completion.request.num_disk_cached_tokens
            self.time_to_first_token.append(now - metrics.arrival_time)
            self.time_to_first_token.fold_if_long()
            self.prompt_tokens += len(group.prompt_token_ids)

    def count_finished(self, seconds: float) -> None:
        """Count a request that ended, without error or abort, `seconds` after its arrival."""
        self.request_latency.append(seconds)
        self.request_latency.fold_if_long()

    def count_refusal(self, error: Exception) -> None:
        """Count a request that can never be served."""
        name = type(error).__name__
        self.refused[name] = self.refused.get(name, 0) + 1

    def stats(self) -> dict[str, object]:
        """Return the counts without the durations, which `Durations.distribution` reads."""
        return {
            "steps": self.steps,
            "lockstep_steps": self.lockstep_steps,
            "steps_out_of_memory": self.steps_out_of_memory,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "finished": dict(self.finished),
            "refused": dict(self.refused),
            **self.drafts.stats(),
        }
