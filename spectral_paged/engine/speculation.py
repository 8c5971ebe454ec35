"""Drafts of next tokens are looked up in what a sequence has, and count only where they come true.

```
sequence     a b c d e ... x b c d       the last tokens `b c d` were there before
draft                              e ... is what followed them
step         computes d and the draft; each place samples a token as it would without any
tokens       up to the first one that differs from the draft, that one included
```

Every token is the one that its place would have sampled in a step of its own, with the same seed,
so that outputs do not depend on drafts (decision 0048).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

from spectral_paged.engine.counters import DraftCounters
from spectral_paged.engine.requests import Completion, Drafter
from spectral_paged.options import SpeculativeConfig
from spectral_paged.scheduler import RequestStatus

MAX_PAUSE = 32  # tokens without a draft, after drafts that were all rejected


class NgramLookup:
    """The places of a sequence's n-grams, which grow with it.

    Args:
        shortest, longest: bounds on the tokens of an n-gram.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        # n -> n-gram -> the place behind its first occurrence
        self._places: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(longest, shortest - 1, -1)
        }
        self._num_read = 0

    def find(self, tokens: Sequence[int]) -> int | None:
        """Return the place of the token that followed the end of `tokens` where it was first.

        The longest n-gram counts. None: no n-gram at the end was there before.

        Args:
            tokens: of the sequence, those of the call before among them.
        """
        count = len(tokens)
        if count > self._num_read:
            for n, places in self._places.items():
                # an n-gram at the very end has no token behind it yet
                for end in range(max(n, self._num_read), count):
                    places.setdefault(tuple(tokens[end - n : end]), end)
            self._num_read = count
        for n, places in self._places.items():
            found = places.get(tuple(tokens[count - n :])) if n < count else None
            if found is not None:
                return found
        return None


class NgramDrafter:
    """Drafts the next tokens of one sequence, and pauses after drafts that did not come true.

    A pause is 1 token long after the first such draft, then 2, 4 and so on up to `MAX_PAUSE`; a
    draft of which a token was accepted ends it.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._lookup = NgramLookup(config.shortest, config.longest)
        self._pause = 0
        self._resumes_at = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that may follow; none if nothing is known of them."""
        if most < 1 or len(tokens) < self._resumes_at:
            return []
        place = self._lookup.find(tokens)
        return [] if place is None else list(tokens[place : place + most])

    def learn(self, num_tokens: int, num_accepted: int) -> None:
        """Hear how many tokens of a draft were accepted; the sequence has `num_tokens` now."""
        self._pause = 0 if num_accepted else min(max(1, 2 * self._pause), MAX_PAUSE)
        self._resumes_at = num_tokens + self._pause


class NoDrafts:
    """Drafts nothing."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        return []

    def learn(self, num_tokens: int, num_accepted: int) -> None:
        pass


NO_DRAFTS = NoDrafts()


class Speculation:
    """Proposes the drafts of a step.

    Requests whose next token depends on functions or grammars of theirs, which the host runs, get
    no drafts.

    Args:
        config: how tokens are drafted.
        running: returns the completions that run, and the tokens that the cache has of each.
        counters: they count requests without drafts.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        running: Callable[[], Mapping[Completion, int]],
        counters: DraftCounters,
    ) -> None:
        self.config, self._running, self._counters = config, running, counters
        self._expected: list[Completion] = []
        counters.accepted_per_pos = [0] * config.num_speculative_tokens

    @classmethod
    def of(
        cls,
        config: SpeculativeConfig | None,
        running: Callable[[], Mapping[Completion, int]],
        counters: DraftCounters,
    ) -> Self | None:
        """Return what proposes drafts by a configuration; None: nothing does."""
        return None if config is None else cls(config, running, counters)

    def drafter_of(self, completion: Completion) -> Drafter:
        """Return a drafter for a completion that has none yet."""
        if completion.owner.params.reads_output:
            self._counters.excluded_requests += completion.output.index == 0
            return NO_DRAFTS
        return NgramDrafter(self.config)

    def expects_drafts(self) -> bool:
        """True if, by the tokens that the host knows, a draft may be there for the next step.

        The newest token of each completion may still be on the device. A step that drafts waits for
        it, because what was looked up before it says little.
        """
        self._expected = [c for c in self._running() if self._draft(c)]
        return bool(self._expected)

    def drafts(self) -> dict[str, list[int]]:
        """Return drafts of the completions whose last token is to be computed, by sequence."""
        found = {}
        for completion, count in self._running().items():
            request = completion.request
            if request.num_pending or count != len(request.token_ids) - 1:
                continue
            if draft := self._draft(completion):
                found[request.request_id] = draft
        for completion in self._expected:  # a step waited for nothing
            if completion.drafter is not None and completion.request.request_id not in found:
                completion.drafter.learn(len(completion.request.token_ids), 0)
        self._expected = []
        return found

    def _draft(self, completion: Completion) -> list[int]:
        request = completion.request
        if request.status is not RequestStatus.RUNNING or not completion.generated:
            return []
        if completion.drafter is None:
            completion.drafter = self.drafter_of(completion)
        most = self.config.num_speculative_tokens
        if request.max_num_tokens is not None:  # the step samples a token behind the draft
            most = min(most, request.max_num_tokens - request.num_tokens - 1)
        return completion.drafter.draft(request.token_ids, most)
