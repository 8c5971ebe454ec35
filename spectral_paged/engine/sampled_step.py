"""A step between its plan and the fetch of its tokens: its inputs, and the tokens it samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from spectral_paged.cache import StepPlan
from spectral_paged.device import upload
from spectral_paged.engine.counters import DraftCounters
from spectral_paged.engine.requests import Completion, RequestGroup
from spectral_paged.grammar import Constraint
from spectral_paged.sampling import (
    PendingTokens,
    Sampled,
    SampledTokens,
    SampleRow,
    SamplingState,
    process,
)

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens that a step gives to the model, flattened in plan order.

    token_ids: 0 in place of those that only the device knows.
    pending: where those are; None if there are none.
    ready: completions whose next token the step samples. One with a draft is there once for its
        last token and once for each token of the draft, in this order.
    logit_rows: the place of the token behind which each of `ready` samples.
    """

    token_ids: list[int]
    pending: PendingTokens | None
    ready: list[Completion]
    logit_rows: Sequence[int]

    @classmethod
    def of(
        cls,
        plan: StepPlan,
        by_sequence: Mapping[str, Completion],
        before: SampledStep | None,
        drafts: Mapping[str, Sequence[int]] | None = None,
    ) -> StepInputs:
        """The inputs of `plan`; `before` is the step whose tokens are not fetched, if any.

        Args:
            drafts: by sequence, as long as the plan has room for.
        """
        if drafts:
            return cls._with_drafts(plan, by_sequence, before, drafts)
        completions = [by_sequence[seq_id] for seq_id in plan.seq_ids]
        ends = plan.starts + plan.counts
        # a last token that the host does not have is on its way, so it is the newest
        unknown = ends > np.array([len(c.request.token_ids) for c in completions])
        count, flat = plan.num_tokens, [0] * plan.num_tokens
        same = before is not None and plan.is_decode and completions == before.completions
        if before is not None and same and unknown.all():  # all go on from what they sampled
            newest = PendingTokens(before.tokens.ids, np.arange(count))
            return cls(flat, newest, completions, range(count))
        last = plan.counts.cumsum() - 1  # the place of each one's last token
        samples, sources = unknown.copy(), np.full(count, -1)
        if before is not None:
            places = before.places
            where = [places[completions[row]] for row in unknown.nonzero()[0].tolist()]
            sources[last[unknown]] = where
        for row in (~unknown | (plan.counts > 1)).nonzero()[0].tolist():
            request, start, end = completions[row].request, int(plan.starts[row]), int(ends[row])
            ids = request.token_ids[start:end]
            first = int(last[row]) + 1 - (end - start)
            flat[first : first + len(ids)] = ids
            samples[row] = end == request.num_tokens
        pending = None
        if before is not None and unknown.any():
            pending = PendingTokens(before.tokens.ids, sources)
        ready = samples.nonzero()[0]
        return cls(
            flat, pending, [completions[row] for row in ready.tolist()], last[ready].tolist()
        )

    @classmethod
    def _with_drafts(
        cls,
        plan: StepPlan,
        by_sequence: Mapping[str, Completion],
        before: SampledStep | None,
        drafts: Mapping[str, Sequence[int]],
    ) -> StepInputs:
        """The inputs of a plan without its drafts, with these put behind their sequences."""
        found = [drafts.get(seq_id, ()) for seq_id in plan.seq_ids]
        plain = cls.of(plan.shortened({s: len(d) for s, d in drafts.items()}), by_sequence, before)
        assert plain.pending is None, "a step with drafts knows its tokens"
        at = dict(zip(plain.ready, plain.logit_rows, strict=True))
        own = (plan.counts - [len(draft) for draft in found]).tolist()
        flat: list[int] = []
        ready: list[Completion] = []
        rows: list[int] = []
        begin = 0
        for seq_id, draft, count in zip(plan.seq_ids, found, own, strict=True):
            completion = by_sequence[seq_id]
            flat += plain.token_ids[begin : begin + count]
            begin += count
            if completion in at:
                ready += [completion] * (1 + len(draft))
                rows += range(len(flat) - 1, len(flat) + len(draft))
            flat += draft
        return cls(flat, None, ready, rows)


@dataclass(frozen=True, slots=True)
class SampledStep:
    """The sampled tokens of a step that are still on the device.

    completions: the completion of each row of `tokens`; once for each token that it may get.
    starting: groups that sampled for the first time; their siblings are among the completions.
    """

    tokens: SampledTokens
    completions: list[Completion]
    starting: list[RequestGroup]

    @property
    def places(self) -> dict[Completion, int]:
        """The row of `tokens` of each completion."""
        return {completion: row for row, completion in enumerate(self.completions)}

    @classmethod
    def draw(
        cls,
        ready: Sequence[Completion],
        logits: Tensor,
        eos_token_ids: Sequence[int],
        state: SamplingState,
        before: SampledStep | None = None,
        drafts: Mapping[str, Sequence[int]] | None = None,
    ) -> SampledStep:
        """Sample a token for each of `ready` from its row of `logits`, `[len(ready), vocab]`.

        A completion that is among `ready` several times samples behind none, one and more tokens
        of its draft, by sequence in `drafts`. Where the completions of `before` go on, they are
        sampled as they were. Siblings that start sample from the row of their first completion. If
        this raises, no request has changed, nor what tables have counted.
        """
        if before is not None and before.goes_on(ready):
            starting: list[RequestGroup] = []
            completions, batch = before.completions, before.tokens.batch
            num_more = num_output_tokens(completions[0]) - batch.rows[0].num_output_tokens
            tokens = SampledTokens(logits, batch.later(num_more), state)
        else:
            picked = list(enumerate(ready))
            starting = [completion.owner for completion in ready if not completion.owner.forked]
            for row, completion in enumerate(ready):
                if not completion.owner.forked:
                    picked.extend((row, sibling) for sibling in completion.owner.completions[1:])
            if len(picked) > len(ready):
                logits = logits[upload([row for row, _ in picked], torch.long, logits.device)]
            completions = [completion for _, completion in picked]
            if constraints := [c.constraint for c in completions if c.constraint is not None]:
                Constraint.fill(constraints)
            rows = [
                sample_row(c, eos_token_ids, state, logits, drafted)
                for c, drafted in zip(completions, drafted_before(completions, drafts), strict=True)
            ]
            tokens = SampledTokens(logits, rows, state)
        tokens.count()
        for group in starting:
            group.forked, group.starting_siblings = True, len(group.completions) > 1
        for completion in completions:
            completion.request.num_pending += 1
        return cls(tokens, completions, starting)

    def goes_on(self, ready: Sequence[Completion]) -> bool:
        """True if `ready` are the same completions, whose next tokens are sampled as these."""
        return not self.starting and self.tokens.batch.may_go_on and ready == self.completions

    @property
    def needs_results(self) -> bool:
        """True if the next step cannot be queued before these tokens are on the host."""
        return self.has_drafts or any(group.starting_siblings for group in self.starting)

    @property
    def has_drafts(self) -> bool:
        """True if some rows stand behind a draft, so that their tokens may not count."""
        return bool(self.tokens.batch.drafted)

    def kept(self, results: Sequence[Sampled | None]) -> list[int]:
        """Return the rows whose tokens count: all before which the draft came true.

        Args:
            results: those of `tokens`.
        """
        rows, kept = self.tokens.batch.rows, [True] * len(results)
        for row in self.tokens.batch.drafted:
            before = results[row - 1]
            kept[row] = (
                kept[row - 1] and before is not None and before.token_id == rows[row].drafted[-1]
            )
        return [row for row, counts in enumerate(kept) if counts]

    def rejected(self) -> dict[str, int]:
        """Wait for the tokens; return how many of each draft did not come true, by sequence."""
        left = set(range(len(self.completions))).difference(self.kept(self.tokens.get()))
        return Counter(self.completions[row].request.request_id for row in left)

    def settle(
        self, results: Sequence[Sampled | None], counters: DraftCounters, state: SamplingState
    ) -> list[tuple[Completion, Sampled | None]]:
        """Return the tokens that count, each with its completion, and forget the others.

        Args:
            results: those of `tokens`.
            state: it forgets the rows of completions that get several tokens, which it has not
                counted. They are made anew from what the host knows.
        """
        kept = self.kept(results)
        drafted = Counter(self.completions[row] for row in self.tokens.batch.drafted)
        accepted = Counter(self.completions[row] for row in kept)
        for completion, count in drafted.items():
            came_true = accepted[completion] - 1  # its own token is none of the draft
            completion.request.num_pending -= count - came_true
            if came_true:  # tables have not counted what was sampled behind the draft
                state.release(completion)
            counters.count(count, came_true)
            if completion.drafter is not None:
                num_tokens = len(completion.request.token_ids) + 1 + came_true
                completion.drafter.learn(num_tokens, came_true)
        return [(self.completions[row], results[row]) for row in kept]

    def withdraw(self) -> None:
        """Undo the changes of `draw` to its requests, because the step is dropped and run again."""
        self.tokens.count(-1)
        for completion in self.completions:
            completion.request.num_pending -= 1
        for group in self.starting:
            group.forked = group.starting_siblings = False


def going_on(ready: list[Completion], logits: Tensor) -> tuple[list[Completion], Tensor]:
    """Return those of `ready` that have not ended, and their rows of `logits`."""
    rows = [row for row, c in enumerate(ready) if c.output.finish_reason is None]
    if len(rows) == len(ready):
        return ready, logits
    places = upload(rows, torch.long, logits.device)
    return [ready[row] for row in rows], logits[places]


class RowFault(Exception):
    """A request's own functions or grammar raised, as `__cause__` says, for one completion."""

    def __init__(self, completion: Completion) -> None:
        super().__init__()
        self.completion = completion


@contextmanager
def _own_work(completion: Completion) -> Iterator[None]:
    try:
        yield
    except OUT_OF_MEMORY:
        raise  # by no fault of the request: the step is taken again
    except Exception as error:
        raise RowFault(completion) from error


def faults_of(
    error: Exception,
    ready: Sequence[Completion],
    logits: Tensor,
    eos_token_ids: Sequence[int],
    state: SamplingState,
    drafts: Mapping[str, Sequence[int]] | None = None,
) -> dict[int, BaseException]:
    """Return what is to blame for the `error` of a draw, by row of `logits`; nothing: no row is.

    Each of `ready` is sampled separately. Where all rows of several requests raise, only those
    whose own functions or grammars do are to blame.
    """
    faults: dict[int, Exception] = {}
    before = drafted_before(ready, drafts)
    for row, completion in enumerate(ready):
        try:
            alone = sample_row(completion, eos_token_ids, state, logits, before[row])
            SampledTokens(logits[row : row + 1], [alone], state)
        except Exception as fault:
            faults[row] = fault
    if isinstance(error, RowFault):  # it may not raise twice
        owner = error.completion.owner
        faults |= {row: error for row, c in enumerate(ready) if c.owner is owner}
    several = len({c.owner.request_id for c in ready}) > 1
    if several and len(faults) == len(ready):
        faults = {row: fault for row, fault in faults.items() if isinstance(fault, RowFault)}
    return {
        row: fault.__cause__ if isinstance(fault, RowFault) and fault.__cause__ else fault
        for row, fault in faults.items()
    }


def _process(completion: Completion, logits: Tensor) -> Tensor:
    group = completion.owner
    with _own_work(completion):
        return process(
            group.params.logits_processors, group.prompt_token_ids, completion.generated, logits
        )


def num_output_tokens(completion: Completion) -> int:
    """Return the number of tokens that a completion has sampled, known on the host or not."""
    return len(completion.generated) + completion.request.num_pending


def drafted_before(
    ready: Sequence[Completion], drafts: Mapping[str, Sequence[int]] | None
) -> list[Sequence[int]]:
    """Return the tokens of drafts before what each of `ready` samples, of which one with a draft is
    there for each of its tokens too."""
    found: list[Sequence[int]] = [()] * len(ready)
    if drafts:
        for row in range(1, len(ready)):
            if ready[row] is ready[row - 1]:
                draft = drafts[ready[row].request.request_id]
                found[row] = draft[: len(found[row - 1]) + 1]
    return found


def sample_row(
    completion: Completion,
    eos_token_ids: Sequence[int],
    state: SamplingState,
    logits: Tensor,
    drafted: Sequence[int] = (),
) -> SampleRow:
    """Return the sampler's inputs for the next token of a completion, whose rows are held.

    Args:
        drafted: tokens of its draft that it is to have before.
    """
    group, params = completion.owner, completion.owner.params
    num_sampled = num_output_tokens(completion) + len(drafted)
    blocked: tuple[int, ...] = ()
    if num_sampled < params.min_tokens:
        eos = () if params.ignore_eos else tuple(eos_token_ids)
        blocked = (*eos, *params.stop_token_ids)
    rows, allowed, processor = (-1, -1), None, None
    if params.changes_logits:
        rows = state.hold(
            completion,
            params,
            logits,
            prompt=group.prompt_token_ids,
            output=completion.generated,
            bad_words=group.bad_words,
            siblings=group.completions,
        )
        if completion.constraint is not None:
            with _own_work(completion):
                allowed = completion.constraint.allowed()
        if params.logits_processors:
            processor = partial(_process, completion)
    return SampleRow(
        params, completion.seed, num_sampled, blocked, *rows, allowed, processor, drafted
    )
