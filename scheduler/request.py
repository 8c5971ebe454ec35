"""One sequence as the scheduler sees it: token ids and counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """There is no prefill phase and no decode phase: computed tokens catch up with `token_ids`.

    `token_ids` is the prompt followed by what was generated so far; after a preemption all of it
    is computed again, and `num_prompt_tokens` stays what it was.

    Attributes:
        max_num_tokens: prompt and output together at most; the last one is never computed.
        num_pending: tokens that are sampled but not in `token_ids` yet: a step may compute them
            before the host has seen them.
        num_lost_tokens: computed before the last preemption; those that a resume finds cached are
            not recomputed.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_num_tokens: int | None = None
    cache_salt: str = ""
    pinned_spans: tuple[tuple[int, int], ...] = ()
    status: RequestStatus = RequestStatus.WAITING
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0
    num_lost_tokens: int = 0
    num_pending: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_to_compute(self) -> int:
        """Tokens to be computed so far."""
        longest = self.max_num_tokens
        return 0 if longest is not None and self.num_tokens >= longest else self.num_tokens
