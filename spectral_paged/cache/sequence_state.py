"""One sequence as the cache façade sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.errors import NonFiniteError


@dataclass(slots=True)
class SequenceState:
    """`num_tokens` counts those whose K and V are stored."""

    num_prompt_tokens: int
    row: int
    token_ids: Sequence[int] | None
    chain: PrefixChain | None = None
    num_tokens: int = 0
    pinned: tuple[int, ...] = ()  # blocks that stay exact
    num_cached_tokens: int = 0
    num_pages_sealed: int = 0  # for this sequence: a fork's parent keeps its own count
    resumed: bool = False
    ran: bool = False  # prefix figures count sequences that ran, not attempts to admit one
    error: NonFiniteError | None = None
