"""A user's request while it runs: its completions, and what they have so far."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from spectral_paged.errors import SpectralPagedError
from spectral_paged.output_text import OutputText
from spectral_paged.outputs import CompletionOutput, RequestMetrics
from spectral_paged.sampling import SamplingParams
from spectral_paged.scheduler import Request


@dataclass(slots=True, eq=False)
class Completion:
    """One of a request's `n` sequences. `token_time`: when its newest token came."""

    request: Request
    owner: RequestGroup
    output: CompletionOutput
    text: OutputText
    seed: int
    token_time: float | None = None

    @property
    def generated(self) -> list[int]:
        return self.output.token_ids


@dataclass(slots=True, eq=False)
class RequestGroup:
    """A user's request: `n` completions of one prompt.

    forked: the first completion's prompt is computed, and all have sampled from it.
    starting_siblings: the others have no sequence of their own yet.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    completions: list[Completion] = field(default_factory=list)
    forked: bool = False
    starting_siblings: bool = False
    error: SpectralPagedError | None = None

    @property
    def finished(self) -> bool:
        return all(c.output.finish_reason is not None for c in self.completions)


def seed_of(params: SamplingParams, otherwise: str, index: int) -> int:
    """The seed of completion `index`: from the request's own, or from the string `otherwise`."""
    base = params.seed if params.seed is not None else otherwise
    digest = hashlib.sha256(f"{base}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
