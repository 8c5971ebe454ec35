"""A user's request while it runs: its completions, and their tokens and text so far."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from spectral_paged.engine.text import OutputText
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import RequestFailedError, SpectralPagedError, shown
from spectral_paged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from spectral_paged.sampling import Sampled, SamplingParams
from spectral_paged.scheduler import Request


@dataclass(slots=True, eq=False)
class Completion:
    """One of a request's `n` sequences.

    token_time: when its newest token arrived, in seconds of the metrics' clock.
    """

    request: Request
    owner: RequestGroup
    output: CompletionOutput
    text: OutputText
    seed: int
    token_time: float | None = None

    @property
    def generated(self) -> list[int]:
        return self.output.token_ids

    def take(
        self, result: Sampled, eos_token_ids: Sequence[int], max_model_len: int
    ) -> tuple[str, str | int | None] | None:
        """Add a sampled token; return the finish and stop reason if the completion ends with it."""
        output, params, text = self.output, self.owner.params, self.text
        token = result.token_id
        self.request.token_ids.append(token)
        output.token_ids.append(token)
        output.cumulative_logprob += result.logprob
        may_stop = len(output.token_ids) >= params.min_tokens
        is_eos = may_stop and token in eos_token_ids and not params.ignore_eos
        if is_eos:
            text.finish()
        if output.logprobs is not None and result.logprobs is not None:
            output.logprobs.append(
                {t: text.logprob(t, p, r) for t, (p, r) in result.logprobs.items()}
            )
        if output.text_offsets is not None:
            output.text_offsets.append(text.offset_of(token))
        stop = None if is_eos else text.append(token, may_stop=may_stop)
        ending: tuple[str, str | int | None] | None = None
        if is_eos:
            ending = "stop", None
        elif may_stop and token in params.stop_token_ids:
            ending = "stop", token
        elif stop is not None:
            ending = "stop", stop
        elif (
            len(output.token_ids) >= params.max_tokens
            or len(self.request.token_ids) >= max_model_len
        ):
            ending = "length", None
        if ending is not None and stop is None:
            text.finish()
        output.text = text.text
        return ending


@dataclass(slots=True, eq=False)
class RequestGroup:
    """A user's request: `n` completions of one prompt.

    forked: the first completion's prompt is computed, and all completions have sampled from it.
    starting_siblings: the other completions have no sequence of their own yet.
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

    def add_completion(
        self,
        index: int,
        tokens: TokenBytes | None,
        *,
        max_model_len: int,
        seed: int,
        cache_salt: str,
        pinned_spans: tuple[tuple[int, int], ...],
    ) -> Completion:
        """Add and return completion `index`, without generated tokens."""
        params, prompt = self.params, self.prompt_token_ids
        request = Request(
            f"{self.request_id}#{index}",
            list(prompt),
            len(prompt),
            min(len(prompt) + params.max_tokens, max_model_len),
            cache_salt=cache_salt,
            pinned_spans=pinned_spans,
        )
        text = OutputText(
            tokens,
            prompt=prompt,
            stop=params.stop_strings,
            skip_special_tokens=params.skip_special_tokens,
        )
        output = CompletionOutput(index)
        if params.logprobs is not None:
            output.logprobs, output.text_offsets = [], []
        self.completions.append(Completion(request, self, output, text, seed))
        return self.completions[-1]

    @property
    def finished(self) -> bool:
        return all(c.output.finish_reason is not None for c in self.completions)

    def result(self) -> RequestOutput:
        """Return the request's output so far."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[c.output for c in self.completions],
            finished=self.finished,
            metrics=self.metrics,
            error=self.error,
        )


def unserved(completion: Completion, what: str, cause: BaseException) -> RequestFailedError:
    """Return the error of a request that failed while `what` happened."""
    error = RequestFailedError(
        f"request {shown(completion.owner.request_id)} failed while {what}, after "
        f"{len(completion.request.token_ids)} tokens: {shown(cause)}"
    )
    error.__cause__ = cause
    return error


def seed_of(params: SamplingParams, otherwise: str, index: int) -> int:
    """Derive the seed of completion `index` from the request's seed or the string `otherwise`.

    A negative seed is none, as in vLLM.
    """
    has_seed = params.seed is not None and params.seed >= 0
    base = params.seed if has_seed else otherwise
    digest = hashlib.sha256(f"{base}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
