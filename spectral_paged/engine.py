"""The engine: requests in, one step at a time, tokens and text out.

```
schedule -> begin_step -> forward (append, attend) -> end_step (publish, seal) -> sample -> update
```
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from spectral_paged.cache import SpectralKVCache
from spectral_paged.errors import (
    CapacityError,
    EmptyPromptError,
    InvalidRequestError,
    NonFiniteError,
    PoolError,
    PromptTooLongError,
    SpectralPagedError,
)
from spectral_paged.kernels.layout import BLOCK_TOKENS
from spectral_paged.output_text import OutputText
from spectral_paged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from spectral_paged.pins import Spans, pinned_blocks, spans_of
from spectral_paged.prompts import token_ids_of
from spectral_paged.sampling import Sampled, SampleRow, SamplingParams, sample
from spectral_paged.scheduler import Request, Scheduler, SchedulerConfig
from spectral_paged.step import PlanEntry, StepPlan


class Runner(Protocol):
    """What runs the model; see `models.runner.ModelRunner`."""

    def forward(
        self, plan: StepPlan, token_ids: Sequence[int], logit_rows: Sequence[int]
    ) -> Tensor: ...


@dataclass(slots=True, eq=False)
class _Completion:
    """One of a request's `n` sequences."""

    request: Request
    owner: _Group
    output: CompletionOutput
    text: OutputText
    seed: int

    @property
    def generated(self) -> list[int]:
        return self.output.token_ids


@dataclass(slots=True, eq=False)
class _Group:
    """A user's request: `n` completions of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    completions: list[_Completion] = field(default_factory=list)
    forked: bool = False
    error: SpectralPagedError | None = None

    @property
    def finished(self) -> bool:
        return all(c.output.finish_reason is not None for c in self.completions)


class Engine:
    """Continuous batching over a `SpectralKVCache`.

    Args:
        runner: runs the model over a planned step.
        cache: holds K and V.
        tokenizer: for string prompts and text; None serves token ids only.
        eos_token_ids: ids that end a completion unless `ignore_eos`.
        seed: base of the seeds of requests that name none.
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
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(cache, scheduler_config or SchedulerConfig())
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = vocab_size
        self.seed = seed
        self.num_steps = 0
        self._groups: dict[str, _Group] = {}
        self._by_sequence: dict[str, _Completion] = {}

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
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is running already")
        text = prompt if isinstance(prompt, str) else None
        token_ids = token_ids_of(prompt, self.tokenizer, self.vocab_size)
        spans = spans_of(pinned_spans)
        self._check(token_ids, params, spans)
        group = _Group(
            request_id, text, token_ids, params, RequestMetrics(arrival_time=time.monotonic())
        )
        for index in range(params.n):
            request = Request(
                f"{request_id}#{index}",
                list(token_ids),
                len(token_ids),
                cache_salt=cache_salt,
                pinned_spans=spans,
            )
            output_text = OutputText(
                self.tokenizer,
                stop=params.stop_strings,
                skip_special_tokens=params.skip_special_tokens,
            )
            output = CompletionOutput(index, logprobs=[] if params.logprobs is not None else None)
            completion = _Completion(
                request, group, output, output_text, self._seed(request_id, params, index)
            )
            group.completions.append(completion)
            self._by_sequence[request.request_id] = completion
        self._groups[request_id] = group
        # the others fork from the first when its prompt is computed
        self.scheduler.add(group.completions[0].request)

    def _check(self, token_ids: list[int], params: SamplingParams, pinned: Spans) -> None:
        cache = self.cache
        if not token_ids:
            raise EmptyPromptError("the prompt is empty: give at least one token")
        if len(token_ids) >= cache.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens; with one to generate, max_model_len "
                f"{cache.max_model_len} allows {cache.max_model_len - 1}: shorten it or raise "
                "max_model_len"
            )
        longest = min(len(token_ids) + params.max_tokens, cache.max_model_len)
        if not cache.fits_alone(
            longest, num_prompt_tokens=len(token_ids), pinned_spans=pinned
        ):
            blocks = pinned_blocks(cache.format, pinned, len(token_ids))
            spans = f" with {len(blocks)} blocks of {BLOCK_TOKENS} pinned exact" if blocks else ""
            raise CapacityError(
                f"{len(token_ids)} prompt tokens and up to {longest - len(token_ids)} generated "
                f"ones{spans} never fit: the pool holds a sequence of at most "
                f"{cache.max_sequence_tokens} tokens{' without pins' if blocks else ''}: raise "
                f"kv_cache_bytes, {'pin less, ' if blocks else ''}or lower max_tokens"
            )
        if self.vocab_size is not None:
            bad = [t for t in params.stop_token_ids if not 0 <= t < self.vocab_size]
            if bad:
                raise InvalidRequestError(
                    f"stop_token_ids {bad} are outside the vocabulary of {self.vocab_size}"
                )

    def _seed(self, request_id: str, params: SamplingParams, index: int) -> int:
        base = params.seed if params.seed is not None else f"{self.seed}/{request_id}"
        digest = hashlib.sha256(f"{base}/{index}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

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

        Raises:
            PoolError: nothing can run and nothing was preempted: the pool is held from outside.
        """
        clock = self.cache.clock
        with clock.section("schedule"):
            scheduled = self.scheduler.schedule()
        if not scheduled.new_tokens:
            if self.scheduler.has_unfinished and not scheduled.preempted:
                raise PoolError(
                    f"no request can run: {len(self.scheduler.running)} running, "
                    f"{len(self.scheduler.waiting)} waiting; every sequence may hold slots that "
                    "another caller of the same cache took"
                )
            return []
        self.num_steps += 1
        plan = self.cache.plan(scheduled.new_tokens)
        flat: list[int] = []
        rows: list[int] = []
        ready: list[PlanEntry] = []
        for entry in plan.entries:
            token_ids = self._by_sequence[entry.seq_id].request.token_ids
            end = entry.start + entry.num_new
            flat.extend(token_ids[entry.start : end])
            if end == len(token_ids):
                rows.append(len(flat) - 1)
                ready.append(entry)
        with clock.section("commit"):
            self.cache.begin_step(plan)
        try:
            with clock.section("model"):
                logits = self.runner.forward(plan, flat, rows or [len(flat) - 1])
        except BaseException:
            self.cache.abort_step()
            raise
        with clock.section("commit"):
            report = self.cache.end_step()
        touched: dict[str, _Group] = {}
        for seq_id, error in report.failed.items():
            completion = self._by_sequence[seq_id]
            self._fail(completion, error)
            touched[completion.owner.request_id] = completion.owner
        if rows:
            with clock.section("sample"):
                self._sample(ready, logits, touched)
        return [self._output(group) for group in touched.values()]

    def _sample(
        self, ready: list[PlanEntry], logits: Tensor, touched: dict[str, _Group]
    ) -> None:
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        picked: list[tuple[int, _Completion]] = []
        for row, entry in enumerate(ready):
            completion = self._by_sequence.get(entry.seq_id)
            if completion is None or completion.output.finish_reason is not None:
                continue
            group = completion.owner
            touched[group.request_id] = group
            if not finite[row]:
                self._fail(
                    completion,
                    NonFiniteError(
                        f"the logits of request {group.request_id!r} have NaN or Inf at token "
                        f"{entry.start + entry.num_new}: check the model's dtype and weights"
                    ),
                )
                continue
            picked.append((row, completion))
            if not group.forked:
                group.forked = True
                picked.extend((row, sibling) for sibling in group.completions[1:])
        if not picked:
            return
        results = sample(
            logits[[row for row, _ in picked]], [self._row(completion) for _, completion in picked]
        )
        now = time.monotonic()
        for (_, completion), result in zip(picked, results, strict=True):
            try:
                self._append(completion, result, now)
            except Exception as error:
                self._fail(
                    completion,
                    InvalidRequestError(
                        f"request {completion.owner.request_id!r} failed while its output was "
                        f"processed: {error!r}"
                    ),
                )
        for _, completion in picked:
            if completion.request.request_id not in self.cache:
                self._start_sibling(completion)

    def _row(self, completion: _Completion) -> SampleRow:
        params = completion.owner.params
        blocked: tuple[int, ...] = ()
        if len(completion.generated) < params.min_tokens:
            eos = () if params.ignore_eos else self.eos_token_ids
            blocked = (*eos, *params.stop_token_ids)
        return SampleRow(
            params,
            completion.seed,
            completion.owner.prompt_token_ids,
            completion.generated,
            blocked,
        )

    def _append(self, completion: _Completion, result: Sampled, now: float) -> None:
        group, output = completion.owner, completion.output
        params = group.params
        completion.request.token_ids.append(result.token_id)
        output.token_ids.append(result.token_id)
        output.cumulative_logprob += result.logprob
        if output.logprobs is not None and result.logprobs is not None:
            output.logprobs.append(
                {t: Logprob(p, r, self._decode(t)) for t, (p, r) in result.logprobs.items()}
            )
        if group.metrics.first_token_time is None:
            group.metrics.first_token_time = now
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
            or completion.request.num_tokens >= self.cache.max_model_len
        ):
            self._finish(completion, "length")

    def _decode(self, token_id: int) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode([token_id])

    def _start_sibling(self, completion: _Completion) -> None:
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
        self, completion: _Completion, reason: str, stop_reason: str | int | None = None
    ) -> None:
        completion.output.finish_reason = reason
        completion.output.stop_reason = stop_reason
        request, metrics = completion.request, completion.owner.metrics
        metrics.num_preemptions += request.num_preemptions
        metrics.num_recomputed_tokens += request.num_recomputed_tokens
        metrics.num_cached_tokens = max(metrics.num_cached_tokens, request.num_cached_tokens)
        if request.request_id in self.cache:
            held = self.cache.sequence_stats(request.request_id)
            metrics.num_pages_sealed += int(held["pages_sealed"])
            metrics.bytes_per_token = held["bytes_per_token"]
            metrics.compression_ratio = held["compression_ratio"]
        self.scheduler.finish(request)

    def _fail(self, completion: _Completion, error: SpectralPagedError) -> None:
        error.request_id = completion.owner.request_id
        completion.owner.error = error
        for other in completion.owner.completions:
            if other.output.finish_reason is None:
                self._finish(other, "error")

    def _forget(self, group: _Group) -> None:
        group.metrics.finished_time = time.monotonic()
        for completion in group.completions:
            self._by_sequence.pop(completion.request.request_id, None)
        self._groups.pop(group.request_id, None)

    def _output(self, group: _Group) -> RequestOutput:
        finished = group.finished
        if finished:
            self._forget(group)
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
        """The cache's figures and the scheduler's."""
        return self.cache.stats() | {
            "steps": self.num_steps,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.num_preemptions,
            "recomputed_tokens": self.scheduler.num_recomputed_tokens,
        }
