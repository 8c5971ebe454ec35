"""Adapters let the conformance kit drive and observe an embedder's loop around the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from spectral_paged.cache import CacheObserver, PlanEntry, SpectralKVCache, StepPlan
from spectral_paged.errors import ConformanceError
from spectral_paged.options import CacheOptions
from spectral_paged.pages import PageFormat

Result = Sequence[int] | Exception
STALLED_STEPS = 1000  # steps without a token for any request


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The model, cache and limits that a check asks an adapter for.

    Attributes:
        model: a transformers causal LM in fp32, which the adapter must not change.
        format: the cache's page format, which needs no calibration.
        cache_options: the options of its `SpectralKVCache`.
        max_step_tokens: the most tokens that a step computes; longer prompts are cut in chunks.
    """

    model: Any
    format: PageFormat
    cache_options: CacheOptions
    max_step_tokens: int = 512


class Adapter(Protocol):
    """A serving loop with the methods that the kit calls.

    Decoding is greedy and ignores end-of-sequence tokens. A request runs until the kit releases it.
    """

    @property
    def cache(self) -> SpectralKVCache:
        """The only cache that the loop uses."""

    def start(self, prompt: Sequence[int], /) -> str:
        """Queue token ids and return the id that the sequence has, or will have, in the cache."""

    def step(self) -> Mapping[str, Result]:
        """Run one step and return each sequence's new token ids, or the error of a failed one.

        The loop frees a failed sequence and does not return it again.
        """

    def release(self, handle: str, /) -> None:
        """End a request in any state, and free its sequence."""


@dataclass(slots=True)
class Evidence:
    """Counts of events during a check, without which a check proves little."""

    steps: int = 0
    preemptions: int = 0
    pages_attended: int = 0
    prefix_hit_tokens: int = 0
    store_hit_tokens: int = 0

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class RequestDriver:
    """The requests that a check sends through an adapter.

    Args:
        num_tokens: the tokens that each request generates before it is released.
    """

    adapter: Adapter
    num_tokens: int
    handles: list[str] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Evidence)
    _made: dict[str, list[int]] = field(default_factory=dict)
    _prompts: dict[str, int] = field(default_factory=dict)  # their lengths

    def start(self, prompt: Sequence[int]) -> str:
        """Queue a prompt.

        Raises:
            ConformanceError: the adapter returned a handle twice.
        """
        handle = self.adapter.start(prompt)
        if handle in self.handles:
            raise ConformanceError(f"start returned {handle!r} twice: a new sequence, a new id")
        self.handles.append(handle)
        self._made[handle] = []
        self._prompts[handle] = len(prompt)
        return handle

    def release(self, handle: str) -> None:
        """End a request before it has all its tokens."""
        self._made.pop(handle, None)
        self.adapter.release(handle)

    def finish(self) -> list[Result]:
        """Run steps until every request has ended; return tokens or errors in order of arrival.

        Raises:
            ConformanceError: no request gets a token any more, or an unknown one does.
        """
        idle = 0
        while self._made:
            idle = 0 if self.step() else idle + 1
            if idle > STALLED_STEPS:
                raise ConformanceError(
                    f"{sorted(self._made)} got no token in {STALLED_STEPS} steps: where reserve "
                    "gives None preempt the newest, and the oldest alone always fits"
                )
        return [self.results[handle] for handle in self.handles]

    def num_made(self, handle: str) -> int:
        """Return the number of tokens of a request so far.

        Raises:
            ConformanceError: the request failed, or more than `STALLED_STEPS` steps have run.
        """
        if self.evidence.steps > STALLED_STEPS or isinstance(self.results.get(handle), Exception):
            raise ConformanceError(f"{handle!r} got no further: {self.results.get(handle)!r}")
        return len(self._made.get(handle, self.results.get(handle, ())))  # type: ignore[arg-type]

    def step(self) -> bool:
        """Run one step; return True if a request got a token or failed."""
        self.evidence.steps += 1
        calls = Calls()
        with self.adapter.cache.observe(calls):
            found = self.adapter.step()
        ended = {h for h, got in found.items() if isinstance(got, Exception)}
        self.evidence.preemptions += sum(h in self._made and h not in ended for h in calls.gone)
        for handle, num_tokens in calls.prompts.items():
            if num_tokens != self._prompts.get(handle, num_tokens):
                raise ConformanceError(
                    f"{handle!r} was added with num_prompt_tokens={num_tokens}, its prompt has "
                    f"{self._prompts[handle]}: it stays the same when a sequence is resumed, and "
                    "reserve takes the first tokens of a sequence nobody added for the prompt"
                )
        for handle, got in found.items():
            if handle not in self._made:
                raise ConformanceError(
                    f"step returned {handle!r}, which was never started or has ended already"
                )
            if isinstance(got, Exception):
                self.results[handle] = got
                del self._made[handle]
                continue
            self._made[handle].extend(got)
            if len(self._made[handle]) >= self.num_tokens:
                self.results[handle] = self._made[handle][: self.num_tokens]
                self.release(handle)
        return bool(found)

    def check_empty(self) -> None:
        """Check that the cache is empty, and add its figures to the evidence.

        Raises:
            PoolError: the cache's bookkeeping is inconsistent.
            ConformanceError: a sequence or page is still in use.
        """
        self.adapter.cache.check_integrity()
        stats: dict[str, Any] = self.adapter.cache.stats()
        held = {
            what: stats[what]
            for what in ("num_sequences", "pages_in_use", "exact_pages_in_use")
            if stats[what]
        }
        if held:
            raise ConformanceError(
                f"every request has ended and the cache still holds {held}: free each sequence "
                "once, whether it was released, failed or was preempted"
            )
        self.evidence.pages_attended = stats["pages_attended"]
        self.evidence.prefix_hit_tokens = stats["prefix_hit_tokens"] + stats["resumed_hit_tokens"]
        self.evidence.store_hit_tokens = stats["prefix_hit_tokens_by_tier"]["host"]


class Calls(CacheObserver):
    """Records the sequences that a loop adds to the cache and frees.

    Attributes:
        prompts: `num_prompt_tokens` of each added sequence.
        gone: the ids of freed sequences, in order.
    """

    def __init__(self) -> None:
        self.prompts: dict[str, int] = {}
        self.gone: list[str] = []

    def added(self, seq_id: str, num_prompt_tokens: int) -> None:
        self.prompts[seq_id] = num_prompt_tokens

    def freed(self, seq_id: str) -> None:
        self.gone.append(seq_id)


class FilledPool:
    """Sequences that take all free memory of a cache while the context is open."""

    def __init__(self, cache: SpectralKVCache) -> None:
        self._cache = cache
        self._held: list[str] = []

    def __enter__(self) -> FilledPool:
        return self

    def take(self) -> None:
        """Take the memory that is free or only cached now."""
        num_tokens = 512
        while num_tokens >= 64:
            name = f"squatter-{len(self._held)}"
            if self._cache.reserve({name: num_tokens}) is None:
                num_tokens //= 2
            else:
                self._held.append(name)

    def __exit__(self, *_: object) -> None:
        for name in self._held:
            self._cache.free(name)


class NaNInjector(CacheObserver):
    """Writes NaN into one key of the sequence `victim` in every layer, before it is stored."""

    def __init__(self, *, position: int) -> None:
        self._position = position
        self._entries: tuple[PlanEntry, ...] = ()
        self.victim = ""
        self.done = False

    def planned(self, plan: StepPlan) -> None:
        self._entries = plan.entries

    def storing(self, layer: int, k: Tensor, v: Tensor) -> None:
        flat = 0
        for entry in self._entries:
            place = self._position - entry.start
            if entry.seq_id == self.victim and 0 <= place < entry.num_new:
                k[flat + place] = float("nan")
                self.done = True
            flat += entry.num_new
