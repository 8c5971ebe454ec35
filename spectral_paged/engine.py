"""The engine: requests in, one step at a time, tokens and text out.

```
schedule -> begin_step -> forward (append, attend) -> draw -> end_step (publish, seal) -> collect
```
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from spectral_paged.admission import check_request
from spectral_paged.cache import SpectralKVCache
from spectral_paged.engine_counters import EngineCounters
from spectral_paged.errors import (
    InvalidRequestError,
    NonFiniteError,
    PoolError,
    SpectralPagedError,
)
from spectral_paged.output_text import OutputText
from spectral_paged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from spectral_paged.pins import Spans, spans_of
from spectral_paged.prompts import token_ids_of
from spectral_paged.request_events import log_failure, log_refusal
from spectral_paged.request_group import Completion, RequestGroup, seed_of
from spectral_paged.sampled_step import SampledStep
from spectral_paged.sampler import Sampled
from spectral_paged.sampling import SamplingParams
from spectral_paged.scheduler import Request, Scheduler, SchedulerConfig
from spectral_paged.step import PendingTokens, StepPlan


class Runner(Protocol):
    """What runs the model; see `models.runner.ModelRunner`."""

    def forward(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
        pending: PendingTokens | None = None,
    ) -> Tensor: ...
    def stats(self) -> dict[str, object]: ...


class Engine:
    """Continuous batching over a `SpectralKVCache`.

    Args:
        runner: runs the model over a planned step.
        cache: holds K and V.
        tokenizer: for string prompts and text; None serves token ids only.
        eos_token_ids: ids that end a completion unless `ignore_eos`.
        seed: base of the seeds of requests that name none.
        async_scheduling: queue a step before the tokens of the one before are fetched. Penalties
            need those tokens, so while a request has any, steps go in lockstep.
    """

    def __init__(
        self,
        runner: Runner,
        cache: SpectralKVCache,
        *,
        tokenizer: Any = None,
        scheduler_config: SchedulerConfig | None = None,
        eos_token_ids: Sequence[int] = (),
        vocab_size: int | None = None,
        seed: int = 0,
        async_scheduling: bool = False,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(cache, scheduler_config or SchedulerConfig())
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = vocab_size
        self.seed = seed
        self.async_scheduling = async_scheduling
        self.counters = EngineCounters()
        self.num_steps = 0
        self.num_lockstep_steps = 0
        self._in_flight: SampledStep | None = None
        self._touched: dict[str, RequestGroup] = {}  # with news that no step has returned
        self._groups: dict[str, RequestGroup] = {}
        self._by_sequence: dict[str, Completion] = {}

    # ---- requests ------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        pinned_spans: Spans = (),
    ) -> None:
        """Queue a prompt (text or token ids).

        `pinned_spans`: `(start, end)` token positions of the prompt that are never sealed.

        Raises:
            EmptyPromptError, PromptTooLongError, CapacityError, InvalidRequestError: the prompt
                can never be served; nothing is queued.
        """
        params = params or SamplingParams()
        try:
            if request_id in self._groups:
                raise InvalidRequestError(f"request id {request_id!r} is running already")
            token_ids = token_ids_of(prompt, self.tokenizer, self.vocab_size)
            spans = spans_of(pinned_spans)
            check_request(self.cache, token_ids, params, spans, self.vocab_size)
        except SpectralPagedError as error:
            self.counters.count_refusal(error)
            log_refusal(request_id, error)
            raise
        text = prompt if isinstance(prompt, str) else None
        group = RequestGroup(
            request_id, text, token_ids, params, RequestMetrics(arrival_time=time.monotonic())
        )
        for index in range(params.n):
            request = Request(
                f"{request_id}#{index}",
                list(token_ids),
                len(token_ids),
                min(len(token_ids) + params.max_tokens, self.cache.max_model_len),
                cache_salt=cache_salt,
                pinned_spans=spans,
            )
            output_text = OutputText(
                self.tokenizer,
                stop=params.stop_strings,
                skip_special_tokens=params.skip_special_tokens,
            )
            output = CompletionOutput(index, logprobs=[] if params.logprobs is not None else None)
            completion = Completion(
                request,
                group,
                output,
                output_text,
                seed_of(params, f"{self.seed}/{request_id}", index),
            )
            group.completions.append(completion)
            self._by_sequence[request.request_id] = completion
        self._groups[request_id] = group
        # the others fork from the first when its prompt is computed
        self.scheduler.add(group.completions[0].request)

    def abort(self, request_id: str) -> None:
        """End a request; what it produced so far stays in its output. Unknown ids are ignored."""
        group = self._groups.get(request_id)
        if group is None:
            return
        for completion in group.completions:
            if completion.output.finish_reason is None:
                self._finish(completion, "abort")
        self._forget(group)

    def has_unfinished(self) -> bool:
        return bool(self._groups)

    # ---- one step ------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; outputs of the requests that got a token or ended.

        With `async_scheduling` a step is queued before the tokens of the one before are fetched,
        so the device never waits for the host; a step's outputs then come with the next call.

        Raises:
            PoolError: nothing can run and nothing was preempted: the pool is held from outside.
        """
        clock = self.cache.clock
        if self._in_flight is not None and self._must_wait():
            self._collect()
        with clock.section("schedule"):
            scheduled = self.scheduler.schedule()
        if not scheduled.new_tokens:
            idle = self._in_flight is None and not self._touched and not scheduled.preempted
            if idle and self.scheduler.has_unfinished:
                raise PoolError(
                    f"no request can run: {len(self.scheduler.running)} running, "
                    f"{len(self.scheduler.waiting)} waiting; every sequence may hold slots that "
                    "another caller of the same cache took"
                )
            self._collect()
            return self._outputs()
        launched = self._launch(scheduled.new_tokens)
        try:
            self._collect()
        except BaseException:  # an interrupt comes where the host waits: in there
            self.cache.abort_step()
            if launched is not None:
                launched.withdraw()
            raise
        self._in_flight = launched
        with clock.section("commit"):
            report = self.cache.end_step()
        for seq_id, error in report.failed.items():
            completion = self._by_sequence.get(seq_id)
            if completion is not None:
                self._fail(completion, error)
                self._touched[completion.owner.request_id] = completion.owner
        if not self.async_scheduling:
            self._collect()
        return self._outputs()

    def _outputs(self) -> list[RequestOutput]:
        """Of every request that got a token or ended since the last call that returned."""
        touched, self._touched = self._touched, {}
        return [self._output(group) for group in touched.values()]

    def _must_wait(self) -> bool:
        """Whether what is to be queued depends on tokens that are not on the host yet."""
        assert self._in_flight is not None
        wait = self._in_flight.needs_results or any(
            group.params.has_penalties for group in self._groups.values()
        )
        self.num_lockstep_steps += wait
        return wait

    def _launch(self, new_tokens: dict[str, int]) -> SampledStep | None:
        """Queue a step and the sampling of its tokens; None where it samples none."""
        clock = self.cache.clock
        self.num_steps += 1
        plan = self.cache.plan(new_tokens)
        before = self._in_flight
        places = {} if before is None else {c: i for i, c in enumerate(before.completions)}
        flat: list[int] = []
        rows: list[int] = []
        ready: list[Completion] = []
        unknown: dict[int, int] = {}
        for entry in plan.entries:
            completion = self._by_sequence[entry.seq_id]
            request = completion.request
            end = entry.start + entry.num_new
            flat.extend(request.token_ids[entry.start : end])
            if end > len(request.token_ids):
                unknown[len(flat)] = places[completion]
                flat.append(0)
            if end == request.num_tokens:
                rows.append(len(flat) - 1)
                ready.append(completion)
        pending = None
        if before is not None and unknown:
            pending = PendingTokens(before.drawn.ids, unknown)
        with clock.section("commit"):
            self.cache.begin_step(plan)
        try:
            with clock.section("model"):
                logits = self.runner.forward(plan, flat, rows or [len(flat) - 1], pending)
            with clock.section("sample"):
                return SampledStep.draw(ready, logits, self.eos_token_ids) if rows else None
        except BaseException:
            self.cache.abort_step()
            raise

    def _collect(self) -> None:
        """Fetch the tokens of the step in flight and give them to their requests."""
        step = self._in_flight
        if step is None:
            return
        with self.cache.clock.section("sample"):
            results = step.drawn.get()
        self._in_flight = None  # not before: a wait that was interrupted can be taken up again
        now = time.monotonic()
        for completion in step.completions:
            completion.request.num_pending -= 1
        for completion, result in zip(step.completions, results, strict=True):
            if completion.output.finish_reason is not None:
                continue  # ended while the step ran
            group = completion.owner
            self._touched[group.request_id] = group
            try:
                if result is None:
                    raise NonFiniteError(
                        f"the logits of request {group.request_id!r} have NaN or Inf after "
                        f"{completion.request.num_tokens} tokens: check the model's dtype and "
                        "weights"
                    )
                self._append(completion, result, now)
            except SpectralPagedError as error:
                self._fail(completion, error)
            except Exception as error:
                self._fail(
                    completion,
                    InvalidRequestError(
                        f"request {group.request_id!r} failed while its output was processed: "
                        f"{error!r}"
                    ),
                )
        for completion in step.completions:
            group = completion.owner
            if group.starting_siblings and completion is not group.completions[0]:
                self._start_sibling(completion)
        for completion in step.completions:
            completion.owner.starting_siblings = False
        self.counters.inter_token_latency.fold_if_long()

    def _append(self, completion: Completion, result: Sampled, now: float) -> None:
        group, output = completion.owner, completion.output
        params = group.params
        completion.request.token_ids.append(result.token_id)
        output.token_ids.append(result.token_id)
        output.cumulative_logprob += result.logprob
        if output.logprobs is not None and result.logprobs is not None:
            output.logprobs.append(
                {t: Logprob(p, r, self._decode(t)) for t, (p, r) in result.logprobs.items()}
            )
        self.counters.generated_tokens += 1
        if completion.token_time is not None:
            self.counters.inter_token_latency.append(now - completion.token_time)
        completion.token_time = now
        if group.metrics.first_token_time is None:
            self._note_first_token(completion, now)
        may_stop = len(output.token_ids) >= params.min_tokens
        is_eos = result.token_id in self.eos_token_ids and not params.ignore_eos
        stop = None
        if not (is_eos and may_stop):
            stop = completion.text.append(result.token_id, may_stop=may_stop)
        output.text = completion.text.text
        if may_stop and is_eos:
            self._finish(completion, "stop")
        elif may_stop and result.token_id in params.stop_token_ids:
            self._finish(completion, "stop", result.token_id)
        elif stop is not None:
            self._finish(completion, "stop", stop)
        elif (
            len(output.token_ids) >= params.max_tokens
            or len(completion.request.token_ids) >= self.cache.max_model_len
        ):
            self._finish(completion, "length")

    def _note_first_token(self, completion: Completion, now: float) -> None:
        metrics = completion.owner.metrics
        metrics.first_token_time = now
        metrics.num_cached_tokens = completion.request.num_cached_tokens
        self.counters.count_first_token(
            now - metrics.arrival_time,
            len(completion.owner.prompt_token_ids),
            metrics.num_cached_tokens if self.cache.prefix_caching else None,
        )

    def _decode(self, token_id: int) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode([token_id])

    def _start_sibling(self, completion: Completion) -> None:
        """Fork a sampled sibling from the first completion, or let it wait and recompute."""
        if completion.output.finish_reason is not None:
            return
        request = completion.request
        parent_id = completion.owner.completions[0].request.request_id
        if (
            parent_id in self.cache
            and len(self.scheduler.running) < self.scheduler.config.max_num_seqs
            and self.cache.fork(
                parent_id,
                request.request_id,
                token_ids=request.token_ids,
                cache_salt=request.cache_salt,
            )
        ):
            self.scheduler.adopt(request)
        else:
            self.scheduler.requeue(request)

    # ---- endings -------------------------------------------------------------------------

    def _finish(
        self, completion: Completion, reason: str, stop_reason: str | int | None = None
    ) -> None:
        completion.output.finish_reason = reason
        completion.output.stop_reason = stop_reason
        self.counters.finished[reason] += 1
        request, metrics = completion.request, completion.owner.metrics
        metrics.num_preemptions += request.num_preemptions
        metrics.num_recomputed_tokens += request.num_recomputed_tokens
        if request.request_id in self.cache:
            held = self.cache.sequence_stats(request.request_id)
            metrics.num_pages_sealed += int(held["pages_sealed"])
            metrics.bytes_per_token = held["bytes_per_token"]
            metrics.compression_ratio = held["compression_ratio"]
        self.scheduler.finish(request)

    def _fail(self, completion: Completion, error: SpectralPagedError) -> None:
        error.request_id = completion.owner.request_id
        completion.owner.error = error
        for other in completion.owner.completions:
            if other.output.finish_reason is None:
                self._finish(other, "error")
        log_failure(completion.owner, error)

    def _forget(self, group: RequestGroup) -> None:
        group.metrics.finished_time = time.monotonic()
        for completion in group.completions:
            self._by_sequence.pop(completion.request.request_id, None)
        self._groups.pop(group.request_id, None)

    def _output(self, group: RequestGroup) -> RequestOutput:
        finished = group.finished
        if finished:
            self._forget(group)
            if group.error is None:
                self.counters.count_finished(time.monotonic() - group.metrics.arrival_time)
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=[c.output for c in group.completions],
            finished=finished,
            metrics=group.metrics,
            error=group.error,
        )

    def settled_text(self, request_id: str, index: int) -> str:
        """Text of a running completion that no later stop string can take back."""
        return self._groups[request_id].completions[index].text.settled()

    def stats(self) -> dict[str, object]:
        """The cache's figures, the runner's, the scheduler's and the requests'.

        Another thread may ask while steps run.
        """
        return self.cache.stats() | self.runner.stats() | self.counters.stats() | {
            "async_scheduling": self.async_scheduling,
            "steps": self.num_steps,
            "lockstep_steps": self.num_lockstep_steps,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.num_preemptions,
            "recomputed_tokens": self.scheduler.num_recomputed_tokens,
        }
