"""The scheduler chooses the requests of a step and their tokens: first come, first served."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spectral_paged.scheduler.request import PreemptionReason, Request, RequestStatus

logger = logging.getLogger(__name__)

STEPS_UNTIL_RAISED = 16  # a lowered token budget is doubled after so many steps


class Cache(Protocol):
    """The methods of a cache that the scheduler calls. `False` and `None` mean "not now"."""

    def add_sequence(
        self,
        seq_id: str,
        *,
        num_prompt_tokens: int,
        token_ids: Sequence[int] | None = None,
        cache_salt: str = "",
        pinned_spans: Sequence[tuple[int, int]] = (),
        resumed: bool = False,
        max_cached_tokens: int | None = None,
    ) -> int | None: ...
    def prefetch(
        self,
        seq_id: str,
        *,
        num_prompt_tokens: int,
        token_ids: Sequence[int],
        cache_salt: str = "",
        pinned_spans: Sequence[tuple[int, int]] = (),
    ) -> bool | None: ...
    def cancel_prefetch(self, seq_id: str) -> None: ...
    def try_reserve(self, seq_id: str, num_new: int) -> bool: ...
    def cancel_reservation(self, seq_id: str) -> None: ...
    def chunk_limit(self, seq_id: str) -> int: ...
    def seals_due(self, seq_id: str, num_new: int) -> int: ...
    def num_tokens(self, seq_id: str) -> int: ...
    def progress(self, seq_ids: list[str]) -> tuple[list[int], list[bool]]: ...
    def sequence_stats(self, seq_id: str) -> Mapping[str, float]: ...
    def free(self, seq_id: str, *, forget: bool = False) -> None: ...
    def reset_prefix_cache(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The budgets of one step: sequences, tokens and seals.

    max_decode_rows: most tokens of sequences that generate, drafts among them; every sequence has
        one in any case.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_seals_per_step: int = 64
    max_decode_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_seals_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(slots=True)
class SchedulerOutput:
    """New tokens by request id, in batch order, and the ids of preempted requests.

    drafts: of the new tokens, those behind a request's last one.
    num_loading: waiting requests whose prefixes are on their way into the cache.
    num_passed: waiting requests that may not start yet.
    """

    new_tokens: dict[str, int] = field(default_factory=dict)
    drafts: dict[str, Sequence[int]] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    num_loading: int = 0
    num_passed: int = 0

    @property
    def num_delayed(self) -> int:
        """Waiting requests that others pass, until what they need is there."""
        return self.num_loading + self.num_passed

    @property
    def num_tokens(self) -> int:
        return sum(self.new_tokens.values())


class Scheduler:
    """The scheduler keeps running requests in order of arrival and a queue of waiting ones.

    When slots run out, the newest running request is preempted: its slots are freed, and it waits
    at the head of the queue to be recomputed. The oldest request is never preempted for a newer
    one, so some request always makes progress (decision 0025).
    """

    def __init__(self, cache: Cache, config: SchedulerConfig) -> None:
        self.cache = cache
        self.config = config
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions: Counter[PreemptionReason] = Counter()
        self.num_recomputed_tokens = 0
        self.token_budget = config.max_num_batched_tokens
        self._num_steps = 0  # since `token_budget` changed

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def has_seat(self) -> bool:
        """True if one more request may run."""
        return len(self.running) < self.config.max_num_seqs

    def adopt(self, request: Request) -> None:
        """Run a request whose sequence the cache already has (a fork), in a free seat."""
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def requeue(self, request: Request) -> None:
        """Put a request at the head of the queue."""
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def finish(self, request: Request, *, forget: bool = False) -> None:
        """Drop a running or waiting request and free its slots.

        With `forget` no later request finds the slots as a prefix.
        """
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self.cache.free(request.request_id, forget=forget)
        elif request.status is RequestStatus.WAITING and request in self.waiting:
            self.waiting.remove(request)
            self.cache.cancel_prefetch(request.request_id)
        request.status = RequestStatus.FINISHED

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_preemptions(self) -> int:
        return self.preemptions.total()

    def lower_budget(self, num_tokens: int) -> None:
        """Limit steps to `num_tokens` tokens; the budget doubles every `STEPS_UNTIL_RAISED`."""
        self.token_budget, self._num_steps = max(1, num_tokens), 0

    def stats(self) -> dict[str, object]:
        """Numbers of requests now, and of preemptions since construction, by reason."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "preemptions": self.num_preemptions,
            **{f"preemptions_{r.name.lower()}": self.preemptions[r] for r in PreemptionReason},
            "recomputed_tokens": self.num_recomputed_tokens,
            "token_budget": self.token_budget,
        }

    # ---- one step ------------------------------------------------------------------------

    def schedule(self, drafts: Mapping[str, Sequence[int]] | None = None) -> SchedulerOutput:
        """Reserve slots for the next step's tokens; empty only when no request can run (yet).

        Args:
            drafts: tokens that a request is to compute behind its last one, as far as the step has
                room.
        """
        output = SchedulerOutput()
        self._num_steps += 1
        if self._num_steps > STEPS_UNTIL_RAISED:
            most = self.config.max_num_batched_tokens
            self.token_budget, self._num_steps = min(2 * self.token_budget, most), 0
        budget = _Budget(self.token_budget, self.config.max_seals_per_step)
        self._schedule_running(output, budget)
        if not output.preempted:
            self._schedule_waiting(output, budget)
        if not (output.new_tokens or output.num_delayed or self.running) and self.waiting:
            # nothing runs, so only cached slots of other requests can be in the way
            self.cache.reset_prefix_cache()
            self._schedule_waiting(output, budget)
        if drafts:
            self._schedule_drafts(output, budget, drafts)
        return output

    def _schedule_running(self, output: SchedulerOutput, budget: _Budget) -> None:
        running = list(self.running)
        stored, quiet = self.cache.progress([request.request_id for request in running])
        left = [request.num_to_compute - n for request, n in zip(running, stored, strict=True)]
        # requests with one token left come first, so that a long prompt never delays them
        single = [i for i, count in enumerate(left) if count == 1]
        several = [i for i, count in enumerate(left) if count > 1]
        if len(single) > budget.tokens:
            quiet = [False] * len(running)  # then the oldest of them go first
        # of a quiet sequence nothing is to be reserved
        visits = [i for i in single if not quiet[i]] + several
        budget.tokens -= len(single) - (len(visits) - len(several))
        chosen = {running[i].request_id: 1 for i in single if quiet[i]}
        for i in visits:
            request = running[i]
            if request.status is not RequestStatus.RUNNING:
                continue  # an earlier request of this loop preempted it
            num_new, seals = self._chunk(request, left[i], budget)
            if num_new == 0:
                continue
            while not self.cache.try_reserve(request.request_id, num_new):
                victim = self.running[-1]
                self._preempt(victim, request, num_new, chosen, output, budget)
                if victim is request:
                    break
            else:
                budget.take(num_new, seals)
                chosen[request.request_id] = num_new
        if any(not quiet[i] for i in single):  # back into order
            names = [running[i].request_id for i in (*single, *several)]
            chosen = {name: chosen[name] for name in names if name in chosen}
        output.new_tokens = chosen

    def _schedule_waiting(self, output: SchedulerOutput, budget: _Budget) -> None:
        output.num_loading = output.num_passed = 0
        while len(self.waiting) > output.num_delayed and budget.tokens:
            if len(self.running) + output.num_loading >= self.config.max_num_seqs:
                return
            request = self.waiting[output.num_delayed]
            if request.num_pending:
                return  # preempted before the host saw its last sampled token
            if request.may_start is not None and not request.may_start():
                output.num_passed += 1
                continue
            loaded: bool | None = True
            if request.max_cached_tokens is None:  # else more may come than may be used
                loaded = self.cache.prefetch(request.request_id, **request.prompt)
            if loaded is None:
                return
            if not loaded:
                output.num_loading += 1
                continue
            cached = self.cache.add_sequence(
                request.request_id,
                **request.prompt,
                resumed=request.is_resumed,
                max_cached_tokens=request.max_cached_tokens,
            )
            if cached is None:
                return
            reserved = False
            try:
                num_new, seals = self._chunk(request, self._remaining(request), budget)
                reserved = num_new > 0 and self.cache.try_reserve(request.request_id, num_new)
            finally:
                if not reserved:  # not now, or something raised: the request keeps waiting
                    self.cache.free(request.request_id)
            if not reserved:
                return
            del self.waiting[output.num_delayed]
            request.status = RequestStatus.RUNNING
            if request.num_preemptions == 0:
                request.num_cached_tokens = cached
                stats = self.cache.sequence_stats(request.request_id)
                request.num_host_cached_tokens = int(stats["host_cached_tokens"])
                request.num_disk_cached_tokens = int(stats["disk_cached_tokens"])
            lost = max(0, request.num_dropped_tokens - cached)
            request.num_dropped_tokens = 0
            request.num_recomputed_tokens += lost
            self.num_recomputed_tokens += lost
            self.running.append(request)
            budget.take(num_new, seals)
            output.new_tokens[request.request_id] = num_new

    def _schedule_drafts(
        self, output: SchedulerOutput, budget: _Budget, drafts: Mapping[str, Sequence[int]]
    ) -> None:
        """Add drafts to the requests that compute their last token, in what the step has left.

        Nothing gives way to a draft, and no draft crosses a change of what queries see.
        """
        most = max(self.config.max_decode_rows, self.config.max_num_seqs)
        rows = most - list(output.new_tokens.values()).count(1)
        for seq_id, draft in drafts.items():
            room = max(0, min(len(draft), rows, budget.tokens))
            if not room or output.new_tokens.get(seq_id) != 1:
                continue
            num_new = min(1 + room, self.cache.chunk_limit(seq_id))
            if num_new == 1:
                continue
            seals = self.cache.seals_due(seq_id, num_new) - self.cache.seals_due(seq_id, 1)
            if budget.allows_seals(seals) and self.cache.try_reserve(seq_id, num_new):
                budget.take(num_new - 1, seals)
                rows -= num_new - 1
                output.new_tokens[seq_id] = num_new
                output.drafts[seq_id] = draft[: num_new - 1]

    def _remaining(self, request: Request) -> int:
        return max(0, request.num_to_compute - self.cache.num_tokens(request.request_id))

    def _chunk(self, request: Request, remaining: int, budget: _Budget) -> tuple[int, int]:
        """Tokens of a request, at most `remaining`, that this step may compute, and the seals that
        they make due; 0 tokens mean "not in this step"."""
        seq_id = request.request_id
        num_new = min(remaining, self.cache.chunk_limit(seq_id), budget.tokens)
        seals = self.cache.seals_due(seq_id, num_new) if num_new else 0
        return (num_new, seals) if budget.allows_seals(seals) else (0, 0)

    def _preempt(
        self,
        victim: Request,
        needy: Request,
        num_new: int,
        chosen: dict[str, int],
        output: SchedulerOutput,
        budget: _Budget,
    ) -> None:
        """Free the slots of `victim`, because `needy` finds none for `num_new` tokens.

        Args:
            chosen: new tokens of the step so far, by request.
        """
        reason = PreemptionReason.OWN_TOKENS if victim is needy else PreemptionReason.OLDER
        dropped = self.cache.num_tokens(victim.request_id)
        if victim.request_id in chosen:
            taken = chosen.pop(victim.request_id)
            budget.give_back(taken, self.cache.seals_due(victim.request_id, taken))
            self.cache.cancel_reservation(victim.request_id)
        self.running.remove(victim)
        stats = self.cache.sequence_stats(victim.request_id)
        victim.num_pages_sealed += int(stats["pages_sealed"])
        self.cache.free(victim.request_id)
        victim.preemptions.append(reason)
        victim.num_dropped_tokens = dropped
        self.preemptions[reason] += 1
        output.preempted.append(victim.request_id)
        self.requeue(victim)
        logger.warning(
            "preempted %s: %s; the pool is full, and %s has %d tokens to store. %d tokens are "
            "dropped, and recomputed unless the prefix cache keeps them (%d running, %d waiting, "
            "%d preemptions so far). More kv_cache_bytes or a smaller max_num_seqs avoids this",
            victim.request_id,
            reason.value,
            needy.request_id,
            num_new,
            dropped,
            len(self.running),
            len(self.waiting),
            self.num_preemptions,
            extra={
                "event": "preemption",
                "request_id": victim.request_id,
                "reason": reason.value,
                "num_dropped_tokens": dropped,
                "num_running": len(self.running),
                "num_waiting": len(self.waiting),
                "num_preemptions": self.num_preemptions,
            },
        )


class _Budget:
    """The tokens and seals that are left in a step."""

    def __init__(self, tokens: int, seals: int) -> None:
        self.tokens = tokens
        self.seals = seals
        self._any_seal = False

    def allows_seals(self, seals: int) -> bool:
        """True if `seals` fit; a step's first request that seals always passes, because a small
        budget would stall it."""
        return seals == 0 or seals <= self.seals or not self._any_seal

    def take(self, tokens: int, seals: int) -> None:
        self.tokens -= tokens
        self.seals -= seals
        self._any_seal = self._any_seal or seals > 0

    def give_back(self, tokens: int, seals: int) -> None:
        self.tokens += tokens
        self.seals += seals
