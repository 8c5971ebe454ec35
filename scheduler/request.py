"""One sequence as the scheduler sees it: token ids and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class PreemptionReason(Enum):
    """Why a running request had to give its slots back."""

    OLDER = "an older request needs its slots"
    OWN_TOKENS = "its own next tokens do not fit"


@dataclass(slots=True, eq=False)
class Request:
    """There is no prefill phase and no decode phase: computed tokens catch up with `token_ids`.

    `token_ids` is the prompt followed by what was generated so far; after a preemption all of it
    is computed again, and `num_prompt_tokens` stays what it was.

    Attributes:
        max_num_tokens: prompt and output together at most; the last one is never computed.
        preemptions: why it was preempted, each time.
        num_dropped_tokens: those it had stored when it was preempted, until it runs again.
        num_recomputed_tokens: of the dropped ones, those that the prefix cache had no more.
        num_pages_sealed: those of lives that a preemption ended.
        num_pending: tokens that are sampled but not in `token_ids` yet: a step may compute them
            before the host has seen them.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_num_tokens: int | None = None
    cache_salt: str = ""
    pinned_spans: tuple[tuple[int, int], ...] = ()
    status: RequestStatus = RequestStatus.WAITING
    preemptions: list[PreemptionReason] = field(default_factory=list)
    num_dropped_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0
    num_pages_sealed: int = 0
    num_pending: int = 0

    @property
    def num_preemptions(self) -> int:
        return len(self.preemptions)

    @property
    def is_resumed(self) -> bool:
        """Whether its prompt was computed before: by itself, or by the one it could not fork."""
        return bool(self.preemptions) or len(self.token_ids) > self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_to_compute(self) -> int:
        """Tokens to be computed so far."""
        longest = self.max_num_tokens
        return 0 if longest is not None and self.num_tokens >= longest else self.num_tokens
