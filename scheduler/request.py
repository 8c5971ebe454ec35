"""A request is one sequence of the scheduler: token ids, counts and a status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypedDict


class Prompt(TypedDict):
    """The tokens of a request as a cache takes them, to look for their prefix and to store them."""

    num_prompt_tokens: int
    token_ids: list[int]
    cache_salt: str
    pinned_spans: tuple[tuple[int, int], ...]


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class PreemptionReason(Enum):
    """The reason why a running request had to give its slots back."""

    OLDER = "an older request needs its slots"
    OWN_TOKENS = "its own next tokens do not fit"


@dataclass(slots=True, eq=False)
class Request:
    """A sequence that waits, runs or has finished, with its token ids and counts.

    A request has no prefill phase and no decode phase: its computed tokens catch up with
    `token_ids`, the prompt followed by the tokens generated so far. After a preemption all of
    them are computed again, and `num_prompt_tokens` stays the same.

    Attributes:
        max_num_tokens: most tokens of prompt and output together; the last one is never computed.
        preemptions: the reason of each preemption.
        num_dropped_tokens: tokens stored at the last preemption; 0 once the request runs again.
        num_recomputed_tokens: dropped tokens that the prefix cache no longer had.
        num_cached_tokens: tokens that the cache had when the request first ran;
            of these `num_host_cached_tokens` came from host memory and `num_disk_cached_tokens`
            from disk.
        num_pages_sealed: pages sealed before preemptions.
        max_cached_tokens: most tokens that the prefix cache may give, the others are computed;
            None: as many as it has.
        may_start: asked before it runs; False: not now, and others pass it. None: it may.
        num_pending: tokens that are sampled but not in `token_ids` yet: a step may compute them
            before the host has seen them.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_num_tokens: int | None = None
    cache_salt: str = ""
    pinned_spans: tuple[tuple[int, int], ...] = ()
    max_cached_tokens: int | None = None
    may_start: Callable[[], bool] | None = None
    status: RequestStatus = RequestStatus.WAITING
    preemptions: list[PreemptionReason] = field(default_factory=list)
    num_dropped_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0
    num_host_cached_tokens: int = 0
    num_disk_cached_tokens: int = 0
    num_pages_sealed: int = 0
    num_pending: int = 0

    @property
    def prompt(self) -> Prompt:
        return {
            "num_prompt_tokens": self.num_prompt_tokens,
            "token_ids": self.token_ids,
            "cache_salt": self.cache_salt,
            "pinned_spans": self.pinned_spans,
        }

    @property
    def num_preemptions(self) -> int:
        return len(self.preemptions)

    @property
    def is_resumed(self) -> bool:
        """True if the prompt was computed before, by this request or by one it could not fork."""
        return bool(self.preemptions) or len(self.token_ids) > self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_to_compute(self) -> int:
        """The number of tokens that are to be computed so far, stored ones included."""
        longest, count = self.max_num_tokens, len(self.token_ids) + self.num_pending
        return 0 if longest is not None and count >= longest else count
