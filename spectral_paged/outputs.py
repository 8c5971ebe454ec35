"""Outputs of requests: completions, log-probabilities, metrics and streamed pieces of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from spectral_paged.errors import SpectralPagedError


class RequestOutputKind(Enum):
    """What `Engine.step` returns of a request that runs; names and values are vLLM's.

    CUMULATIVE: its whole output so far. DELTA: what came since the last one. FINAL_ONLY: nothing
    before it has ended.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token, its rank among all (1 is the most probable) and its text.

    `token_bytes`: what the token adds to the text before it, which may be a part of a character;
    `decoded_token` has U+FFFD in place of such.
    """

    logprob: float
    rank: int
    decoded_token: str
    token_bytes: bytes = b""


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request.

    `finish_reason` is stop, length, repetition, abort or error, and None while the completion runs.
    `stop_reason` is the stop string or stop token id that ended it, if one did, and
    `repetition_detected` where its end repeats itself.
    `text_offsets`: for each token, the place in `text` of the character that its first byte
    belongs to, if the request asked for log-probabilities.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    text_offsets: list[int] | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times and counts of one request. Times are seconds of a monotonic clock.

    `num_cached_tokens`: prompt tokens that the prefix cache had when the request began, of which
    `num_host_cached_tokens` came from host memory (`kv_host_memory`) and
    `num_disk_cached_tokens` from disk (`kv_store`).
    `num_pages_sealed`: summed over all completions, preempted runs included; pages that forks
    share count once. `preemption_reasons`: one for each preemption. `num_recomputed_tokens`:
    tokens that a preemption dropped and the prefix cache no longer had on resumption.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_host_cached_tokens: int = 0
    num_disk_cached_tokens: int = 0
    num_pages_sealed: int = 0
    num_preemptions: int = 0
    preemption_reasons: list[str] = field(default_factory=list)
    num_recomputed_tokens: int = 0
    bytes_per_token: float = 0.0
    compression_ratio: float = 1.0


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt, its completions so far, and its metrics.

    `prompt_logprobs`: the table of each token of the prompt under the tokens before it, None for
    the first one; None until the prompt is computed, and if the request did not ask for it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    error: SpectralPagedError | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed, by vLLM's name."""
        return self.metrics.num_cached_tokens


@dataclass(slots=True)
class BeamSearchSequence:
    """A sequence of a beam search.

    `tokens`: prompt and output; `text` is theirs, special tokens spelled out. `logprobs`: for each
    token of the output, the most probable ones in its place. `cum_logprob`: the sum of the
    output's. `finish_reason` is stop or length.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str = ""
    finish_reason: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The sequences of one prompt's beam search, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of a streaming completion.

    `finish_reason` is set on the completion's last piece. `logprobs` has a table for each of
    `token_ids` and `text_offsets` its place, if the request asked for log-probabilities.
    `prompt_logprobs`: those of the prompt, on the first piece of completion 0.
    """

    request_id: str
    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    error: SpectralPagedError | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: list[int] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


def ratio_text(ratio: float) -> str:
    """Return a compression ratio, such as 3.25x, and below 1 the reason beside it."""
    text = f"{ratio:.2f}x"
    if float(text[:-1]) >= 1:
        return text
    return f"{text} (short sequences leave places of their exact pages free)"
