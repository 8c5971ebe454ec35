"""The requests of an engine until they end: by id, by sequence, and those that changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet

from spectral_paged.cache import SpectralKVCache
from spectral_paged.engine.counters import EngineCounters
from spectral_paged.engine.events import log_failure
from spectral_paged.engine.prompt_logprobs import PromptLogprobs
from spectral_paged.engine.requests import Completion, RequestGroup
from spectral_paged.engine.sampled_step import OUT_OF_MEMORY
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import NonFiniteError, SpectralPagedError
from spectral_paged.outputs import RequestOutput
from spectral_paged.sampling import SamplingState
from spectral_paged.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Search(Protocol):
    """A beam search, whose caller runs it between the steps of the engine."""

    @property
    def finished(self) -> bool: ...
    def step(self) -> None: ...
    def fail(self, error: SpectralPagedError) -> None:
        """End it with an error, which its caller gets."""


class RequestTable:
    """The requests of an engine that have not ended, or whose end no output has told yet.

    Args:
        cache: the cache that holds the sequences.
        scheduler: the scheduler that runs them.
        counters: they count endings.
        state: what sampling keeps of completions until these end.

    Attributes:
        by_id: requests by their id.
        by_sequence: completions by the id of their sequence, whether the cache holds it or not.
        prompt_logprobs: those that are being computed, by the id of the sequence that does.
        searches: beam searches that are not finished, whose sequences are in the cache.
        reading: ids of the requests whose tokens the host has to know before the next are drawn.
    """

    def __init__(
        self,
        cache: SpectralKVCache,
        scheduler: Scheduler,
        counters: EngineCounters,
        state: SamplingState,
    ) -> None:
        self.by_id: dict[str, RequestGroup] = {}
        self.by_sequence: dict[str, Completion] = {}
        self.prompt_logprobs: dict[str, PromptLogprobs] = {}
        self.searches: WeakSet[Search] = WeakSet()
        self.reading: set[str] = set()
        self._cache = cache
        self._scheduler = scheduler
        self._counters = counters
        self._state = state
        self._touched: dict[str, RequestGroup] = {}  # changed since outputs were taken

    def add(self, group: RequestGroup, tokens: TokenBytes | None) -> None:
        """Queue a request, the first of its completions alone: others are forked from it, once its
        prompt is computed.

        Args:
            tokens: the text of log-probabilities; None: they have none.
        """
        self.by_sequence |= {c.request.request_id: c for c in group.completions}
        self.by_id[group.request_id] = group
        request, params = group.completions[0].request, group.params
        if params.reads_output:
            self.reading.add(group.request_id)
        if params.wanted_of_prompt is not None:
            self.prompt_logprobs[request.request_id] = PromptLogprobs(
                request,
                params.wanted_of_prompt,
                tokens if params.detokenize else None,
                skip_special_tokens=params.skip_special_tokens,
            )
        self._scheduler.add(request)

    def take_prompt_logprobs(self, completion: Completion) -> None:
        """Give a completion's request the log-probabilities of its prompt, if it has computed them.

        Raises:
            NonFiniteError: the prompt's logits have NaN or Inf.
        """
        found = self.prompt_logprobs.pop(completion.request.request_id, None)
        if found is not None:
            completion.owner.prompt_logprobs = found.finish()

    def start_sibling(self, completion: Completion) -> None:
        """Fork a sampled sibling from the first completion, or queue it to compute its prompt."""
        if completion.output.finish_reason is not None:
            return
        request = completion.request
        parent_id = completion.owner.completions[0].request.request_id
        forked = False
        try:
            forked = (
                parent_id in self._cache
                and self._scheduler.has_seat
                and self._cache.fork(
                    parent_id,
                    request.request_id,
                    token_ids=request.token_ids,
                    cache_salt=request.cache_salt,
                )
            )
        except OUT_OF_MEMORY as error:
            logger.warning("%s is recomputed: its fork failed: %s", request.request_id, error)
        finally:
            if forked:
                self._scheduler.adopt(request)
            else:
                self._state.release(completion)
                self._scheduler.requeue(request)

    def running(self) -> dict[Completion, int]:
        """The completions that run, and the tokens that the cache has stored of each."""
        names = [request.request_id for request in self._scheduler.running]
        stored, _ = self._cache.progress(names)
        return {self.by_sequence[name]: n for name, n in zip(names, stored, strict=True)}

    def touch(self, group: RequestGroup) -> None:
        """Let the next outputs include the request."""
        self._touched[group.request_id] = group

    @property
    def has_touched(self) -> bool:
        """True if there are outputs to take."""
        return bool(self._touched)

    def take_outputs(self) -> list[RequestOutput]:
        """Return the outputs of the requests that changed since the last call that returned, and
        forget those that have ended."""
        touched, self._touched = list(self._touched.values()), {}
        for group in touched:
            if group.finished:
                self._forget(group)
                if group.error is None:
                    self._counters.count_finished(time.monotonic() - group.metrics.arrival_time)
        return [news for group in touched if (news := group.news()) is not None]

    # ---- endings -------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """End a request, which no output tells. Unknown ids are ignored."""
        group = self.by_id.get(request_id)
        if group is None:
            return
        for completion in group.completions:
            if completion.output.finish_reason is None:
                self.finish(completion, "abort")
        self._touched.pop(request_id, None)
        self._forget(group)

    def finish(
        self, completion: Completion, reason: str, stop_reason: str | int | None = None
    ) -> None:
        """End a completion, and free its sequence."""
        if reason in ("abort", "error"):
            with suppress(Exception):  # a tokenizer that raises keeps no request from ending
                completion.write_text()
        completion.output.finish_reason = reason
        completion.output.stop_reason = stop_reason
        self._counters.finished[reason] += 1
        request, metrics = completion.request, completion.owner.metrics
        metrics.num_preemptions += request.num_preemptions
        metrics.preemption_reasons += [reason.value for reason in request.preemptions]
        metrics.num_recomputed_tokens += request.num_recomputed_tokens
        metrics.num_pages_sealed += request.num_pages_sealed
        if request.request_id in self._cache:
            held = self._cache.sequence_stats(request.request_id)
            metrics.num_pages_sealed += int(held["pages_sealed"])
            metrics.bytes_per_token = held["bytes_per_token"]
            metrics.compression_ratio = held["compression_ratio"]
        self.touch(completion.owner)
        self._state.release(completion)
        self._scheduler.finish(request, forget=isinstance(completion.owner.error, NonFiniteError))

    def fail(self, completion: Completion, error: SpectralPagedError) -> None:
        """End the completion's request with an error, all of its completions with it."""
        if completion.output.finish_reason is not None:
            return  # it has finished, or failed with another completion of its request
        error.request_id = completion.owner.request_id
        completion.owner.error = error
        self.touch(completion.owner)
        for other in completion.owner.completions:
            if other.output.finish_reason is None:
                self.finish(other, "error")
        log_failure(completion.owner, error)

    def fail_sequences(self, failed: Mapping[str, SpectralPagedError]) -> None:
        """End the requests of failed sequences; those of other callers are left to them."""
        for seq_id, error in failed.items():
            if seq_id in self.by_sequence:
                self.fail(self.by_sequence[seq_id], error)

    def _forget(self, group: RequestGroup) -> None:
        group.metrics.finished_time = time.monotonic()
        for completion in group.completions:
            self.by_sequence.pop(completion.request.request_id, None)
            self.prompt_logprobs.pop(completion.request.request_id, None)
        if self.by_id.pop(group.request_id, None) is not None and group.adapter is not None:
            group.adapter.release()
        self.reading.discard(group.request_id)
