"""The engine takes requests, runs one step at a time and returns tokens and text.

```
schedule -> begin_step -> forward (append, attend) -> draw -> end_step (publish, seal) -> collect
```
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from spectral_paged.cache import Spans, SpectralKVCache, StepPlan, spans_of
from spectral_paged.device import StepClock
from spectral_paged.engine.adapters import Adapters, ModelInputs, held, indices_of, prefix_salt
from spectral_paged.engine.admission import MAX_LOGPROBS, check_request, most_tokens, stalled
from spectral_paged.engine.counters import EngineCounters
from spectral_paged.engine.events import counted_refusal
from spectral_paged.engine.prompt_encoder import PromptEncoder
from spectral_paged.engine.prompt_logprobs import PromptRows
from spectral_paged.engine.prompts import check_salt
from spectral_paged.engine.request_table import RequestTable
from spectral_paged.engine.requests import Completion, RequestGroup, no_token, seed_of, unserved
from spectral_paged.engine.sampled_step import (
    OUT_OF_MEMORY,
    SampledStep,
    StepInputs,
    faults_of,
    going_on,
)
from spectral_paged.engine.sleep import Sleep
from spectral_paged.engine.speculation import Speculation
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import InvalidRequestError, NonFiniteError, SpectralPagedError, shown
from spectral_paged.grammar import GrammarCompiler
from spectral_paged.options import LoRARequest, SpeculativeConfig
from spectral_paged.outputs import RequestMetrics, RequestOutput
from spectral_paged.sampling import (
    LogitsVisitor,
    PendingTokens,
    Sampled,
    SamplingParams,
    SamplingState,
)
from spectral_paged.scheduler import Scheduler, SchedulerConfig, SchedulerOutput

logger = logging.getLogger(__name__)

LOADING_SECONDS = 0.0005  # until what delays requests is asked for again, where nothing runs


class Runner(Protocol):
    """Runs the model over a planned step; `models.runner.ModelRunner` is the one for LLMs."""

    def forward(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
        pending: PendingTokens | None = None,
        visitor: LogitsVisitor | None = None,
        adapters: Sequence[int] | None = None,
    ) -> Tensor: ...
    def sleep(self) -> None: ...
    def wake_up(self) -> None: ...
    def stats(self) -> dict[str, object]: ...


class Engine:
    """Continuous batching over a `SpectralKVCache`.

    Args:
        runner: runs the model over a planned step.
        cache: stores K and V of all sequences.
        tokenizer: encodes string prompts and decodes tokens; None serves token ids only.
        eos_token_ids: ids that end a completion unless `ignore_eos`.
        seed: base of the seeds of requests without a seed.
        max_logprobs: most log-probabilities of a token that a request may ask for; -1: of all.
        async_scheduling: queue a step before the tokens of the one before are fetched (decision
            0020). The step after one in which the siblings of `n > 1` start goes in lockstep.
        adapters: LoRA adapters that requests may name; the runner is told which sequence has which.
        speculative_config: how next tokens are drafted (decision 0048); None: they are not.
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
        max_logprobs: int = MAX_LOGPROBS,
        async_scheduling: bool = False,
        adapters: Adapters | None = None,
        speculative_config: SpeculativeConfig | None = None,
    ) -> None:
        self.runner, self.cache, self.adapters = runner, cache, adapters
        self.token_bytes = None if tokenizer is None else TokenBytes(tokenizer)
        self.scheduler = Scheduler(cache, scheduler_config or SchedulerConfig())
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size, self.seed, self.max_logprobs = vocab_size, seed, max_logprobs
        self.tokenizer = tokenizer
        texts = None
        if self.token_bytes is not None:
            texts = partial(self.token_bytes.grammar_vocabulary, vocab_size or 0, eos_token_ids)
        self.grammars = GrammarCompiler(texts, self.eos_token_ids)
        self.async_scheduling = async_scheduling
        self.counters, self.sampling_state = EngineCounters(), SamplingState()
        self.requests = RequestTable(cache, self.scheduler, self.counters, self.sampling_state)
        running, counters = self.requests.running, self.counters.drafts
        self.speculation = Speculation.of(speculative_config, running, counters)
        self.sleep = Sleep(runner, cache, self.requests)
        self.use_clock(StepClock())
        self._scheduled = SchedulerOutput()
        self._in_flight: SampledStep | None = None
        self._drawn: SampledStep | None = None  # the last one, whose batch may go on
        self._arrived: deque[tuple[Completion, Sampled | None]] = deque()  # to be delivered
        self._siblings: deque[Completion] = deque()  # to be forked from the first completion

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of prompts and messages, which `prompt_encoder` uses."""
        return self.prompt_encoder.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        longest = self.cache.max_model_len
        self.prompt_encoder = PromptEncoder(tokenizer, self.vocab_size, longest, self.eos_token_ids)

    def use_clock(self, clock: StepClock) -> None:
        """Time the sections of steps, the cache's included, with `clock` from now on."""
        self.clock = self.cache.clock = clock

    # ---- requests ------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        pinned_spans: Spans = (),
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Queue a prompt (text or token ids).

        Args:
            cache_salt: requests with different salts never share cached tokens.
            pinned_spans: `(start, end)` positions of prompt tokens that are never sealed.
            lora_request: the adapter that computes it, which is loaded if need be. It waits while
                adapters of others are in all places.

        Raises:
            EmptyPromptError, PromptTooLongError, CapacityError, InvalidRequestError: the prompt
                can never be served. Nothing is queued.
        """
        with counted_refusal(self.counters, request_id), ExitStack() as undo:
            if request_id in self.requests.by_id:
                raise InvalidRequestError(f"request id {shown(request_id)} is running already")
            check_salt(cache_salt)
            params = (params or SamplingParams()).clone()  # what is assigned later changes nothing
            token_ids = self.prompt_encoder.encode(
                prompt, truncate_prompt_tokens=params.truncate_prompt_tokens
            )
            spans = spans_of(pinned_spans)
            check_request(self.cache, token_ids, params, spans, self.vocab_size, self.max_logprobs)
            asked = params.structured_outputs
            grammar = None if asked is None else self.grammars.compile(asked)
            adapter = held(self.adapters, lora_request, waits=True)
            if adapter is not None:
                undo.callback(adapter.release)
            group = RequestGroup(
                request_id,
                prompt if isinstance(prompt, str) else None,
                token_ids,
                params,
                RequestMetrics(arrival_time=time.monotonic()),
                self.prompt_encoder.encode_bad_words(params.bad_words),
                grammar,
                adapter,
            )
            for index in range(params.n):
                group.add_completion(
                    index,
                    self.token_bytes,
                    max_num_tokens=most_tokens(self.cache, len(token_ids), params),
                    seed=seed_of(params, f"{self.seed}/{request_id}", index),
                    cache_salt=prefix_salt(cache_salt, adapter),
                    pinned_spans=spans,
                )
            undo.pop_all()
        self.requests.add(group, self.token_bytes)

    def abort(self, request_id: str) -> None:
        """End a request. Its output keeps the tokens so far. Unknown ids are ignored."""
        self.requests.abort(request_id)
        self._forget_steps()

    def _forget_steps(self) -> None:
        """Keep nothing of the last steps, and of their requests, once there is no request."""
        if not self.requests.by_id:
            self._in_flight = self._drawn = None

    def has_unfinished(self) -> bool:
        return bool(self.requests.by_id)

    # ---- one step ------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step and return the outputs of the requests that got a token or ended.

        With `async_scheduling` a step is queued before the tokens of the one before are fetched,
        so the device never waits for the host. A step's outputs then come with the next call.

        A step that runs out of memory is dropped, and later steps get half its tokens. A request
        that runs out of memory with a single token fails. `step` may be called again after errors.

        Raises:
            PoolError: nothing can run and nothing was preempted: another caller holds the pool.
        """
        if self.sleep.parts:
            self.sleep.check()
        try:
            self._step()
        except OUT_OF_MEMORY as error:
            self._after_out_of_memory(error)
        outputs = self.requests.take_outputs()
        self._forget_steps()
        return outputs

    def _step(self) -> None:
        clock = self.clock
        self._scheduled = SchedulerOutput()
        if self._arrived or self._siblings or (self._in_flight is not None and self._must_wait()):
            self._collect()
        if self.cache.has_late_failures:  # so that failed sequences are not scheduled again
            self.requests.fail_sequences(self.cache.settle().failed)
        with clock.section("schedule"):
            guesses = self.speculation if self._in_flight is None else None
            drafts = None if guesses is None else guesses.drafts()
            scheduled = self._scheduled = self.scheduler.schedule(drafts)
        if scheduled.preempted:  # its rows of sampling state are given back below
            self._drawn = None
        for seq_id in scheduled.preempted:  # counted again where it goes on
            self.sampling_state.release(self.requests.by_sequence[seq_id])
        if not scheduled.new_tokens:
            idle = self._in_flight is None and not scheduled.preempted
            if idle and not self.requests.has_touched and self.scheduler.has_unfinished:
                if not scheduled.num_delayed:
                    raise stalled(self.scheduler)
                time.sleep(LOADING_SECONDS)
            self._collect()
            return
        launched = self._launch(scheduled)
        try:
            self._collect()
        except BaseException:  # an interrupt arrives where the host waits: in `_collect`
            self.cache.abort_step()
            if launched is not None:
                launched.withdraw()
            raise
        self._in_flight = launched
        try:
            if launched is not None and scheduled.drafts:
                self.cache.take_back(launched.rejected())
            with clock.section("commit"):
                report = self.cache.end_step()
        except BaseException:  # tokens that were not counted as stored are computed again
            self.cache.abort_step()
            raise
        self.requests.fail_sequences(report.failed)
        if scheduled.drafts or not self.async_scheduling:
            self._collect()

    def _after_out_of_memory(self, error: BaseException) -> None:
        """Halve the token budget after a step ran out of memory, or fail its only request."""
        self.counters.steps_out_of_memory += 1
        scheduled = self._scheduled.new_tokens
        num_tokens = self._scheduled.num_tokens or self.scheduler.token_budget
        if num_tokens > 1:
            self.scheduler.lower_budget(num_tokens // 2)
            logger.warning(
                "a step of %d tokens of %s ran out of memory (%s): it is taken again with at most "
                "%d tokens. A smaller max_num_batched_tokens, max_num_seqs or cache avoids this",
                num_tokens,
                ", ".join(scheduled) or "requests not chosen yet",
                error,
                self.scheduler.token_budget,
            )
            return
        known = [r.request_id for r in (*self.scheduler.running, *self.scheduler.waiting)]
        for seq_id in list(scheduled) or known[:1]:
            completion = self.requests.by_sequence[seq_id]
            self.requests.fail(
                completion, unserved(completion, "a step of one token was run", error)
            )

    def _must_wait(self) -> bool:
        """Return whether the next step depends on tokens that are not on the host yet."""
        assert self._in_flight is not None
        wait, guesses = self._in_flight.needs_results, self.speculation
        wait = wait or (guesses is not None and guesses.expects_drafts())
        self.counters.lockstep_steps += wait
        return wait

    def _launch(self, scheduled: SchedulerOutput) -> SampledStep | None:
        """Queue a step and the sampling of its tokens; return None if it samples none."""
        clock = self.clock
        self.counters.steps += 1
        plan, drafts = self.cache.plan(scheduled.new_tokens, scheduled.drafts), scheduled.drafts
        inputs = StepInputs.of(plan, self.requests.by_sequence, self._in_flight, drafts)
        ready, rows = inputs.ready, inputs.logit_rows or [plan.num_tokens - 1]
        prompts = self.requests.prompt_logprobs
        visitor = PromptRows(plan, prompts) if prompts else None
        try:
            with clock.section("commit"):
                self.cache.begin_step(plan)
            with clock.section("model"):
                ids, pending = inputs.token_ids, inputs.pending
                how: ModelInputs = {}
                if self.adapters is not None:
                    how = indices_of(plan, self.requests.by_sequence)
                if visitor is not None and visitor.rows:
                    logits = self.runner.forward(plan, ids, rows, pending, visitor, **how)
                    visitor.hand_out()
                else:
                    logits = self.runner.forward(plan, ids, rows, pending, **how)
            if self.requests.reading:
                ready, logits = self._known(ready, logits)
            with clock.section("sample"):
                return self._draw(ready, logits) if ready else None
        except BaseException:
            self.cache.abort_step()
            raise

    def _known(self, ready: list[Completion], logits: Tensor) -> tuple[list[Completion], Tensor]:
        """Deliver the tokens before those to be drawn, if one of `ready` needs to know them.

        The device runs the model meanwhile. Returns the completions that go on, and their logits.
        """
        if not any(c.owner.params.reads_output for c in ready):
            return ready, logits
        self._collect()
        return going_on(ready, logits)

    def _draw(self, ready: list[Completion], logits: Tensor) -> SampledStep | None:
        """Sample a token for each of `ready` from its row of `logits`, `[len(ready), vocab]`.

        If that raises, the requests that are to blame fail, and the others are sampled again.
        None: no completion is left.

        Raises:
            Exception: no request is to blame: see `faults_of`.
        """
        eos, state, drafts = self.eos_token_ids, self.sampling_state, self._scheduled.drafts
        while ready:
            try:
                self._drawn = SampledStep.draw(ready, logits, eos, state, self._drawn, drafts)
                return self._drawn
            except OUT_OF_MEMORY:
                raise
            except Exception as error:
                faults = faults_of(error, ready, logits, eos, state, drafts)
                if not faults:
                    raise
            for row, cause in faults.items():
                if not isinstance(cause, SpectralPagedError):
                    cause = unserved(ready[row], "its token was sampled", cause)
                self.requests.fail(ready[row], cause)
            ready, logits = going_on(ready, logits)
        return None

    def _collect(self) -> None:
        """Fetch the tokens of the step in flight and deliver them to their completions.

        After an exception or an interrupt the next call resumes where this one stopped.
        """
        step = self._in_flight
        if step is not None:
            with self.clock.section("sample"):
                results = step.tokens.get()
            drafts, state = self.counters.drafts, self.sampling_state
            pairs = zip(step.completions, results, strict=True)
            self._arrived.extend(step.settle(results, drafts, state) if step.has_drafts else pairs)
            self._in_flight = None  # not before `get`, which an interrupt may end early
        now = time.monotonic()
        while self._arrived:
            self._deliver(*self._arrived.popleft(), now)
        while self._siblings:
            self.requests.start_sibling(self._siblings.popleft())
        self.counters.inter_token_latency.fold_if_long()

    def _deliver(self, completion: Completion, result: Sampled | None, now: float) -> None:
        """Add a token to its completion. If that raises, only the completion's request fails."""
        group = completion.owner
        completion.request.num_pending -= 1
        if group.starting_siblings and completion is not group.completions[0]:
            self._siblings.append(completion)
            group.starting_siblings = completion is not group.completions[-1]
        if completion.output.finish_reason is not None:
            return  # ended while the step ran
        if group.tells_all:
            self.requests.touch(group)
        ending = None
        try:
            if result is not None and result.token_id < 0:
                raise no_token(completion)
            if result is None:
                raise NonFiniteError(
                    f"the logits of request {shown(group.request_id)} have NaN or Inf after "
                    f"{completion.request.num_tokens} tokens: check the model's dtype and weights"
                )
            if self.requests.prompt_logprobs:
                self.requests.take_prompt_logprobs(completion)
            self.counters.count_token(completion, now)
            ending = completion.take(result, self.eos_token_ids)
        except SpectralPagedError as error:
            self.requests.fail(completion, error)
        except BaseException as error:
            self.requests.fail(completion, unserved(completion, "its output was processed", error))
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        if ending is not None:
            self.requests.finish(completion, *ending)

    def settled_text(self, request_id: str, index: int) -> str:
        """Return the text of a running completion that no later stop string can remove."""
        return self.requests.by_id[request_id].completions[index].settled_text()

    def stats(self) -> dict[str, object]:
        """Return the figures of the cache, the runner, the scheduler and the requests.

        Another thread may call this while steps run.
        """
        found: dict[str, object] = {"async_scheduling": self.async_scheduling}
        found |= self.cache.stats() | self.runner.stats() | self.scheduler.stats()
        found |= self.counters.stats() | self.sampling_state.stats()
        return found
