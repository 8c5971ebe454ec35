"""A user's request while it runs: its completions, and their tokens and text so far."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from spectral_paged.engine.text import OutputText
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import InvalidRequestError, RequestFailedError, SpectralPagedError, shown
from spectral_paged.grammar import Constraint, Grammar
from spectral_paged.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
)
from spectral_paged.sampling import Sampled, SamplingParams
from spectral_paged.scheduler import Request


class Adapter(Protocol):
    """A LoRA adapter that a request holds.

    index: its place in the tensors of all adapters, at least 1; 0: it has none yet.
    key: 64 hex digits of what it is.
    """

    @property
    def index(self) -> int: ...
    @property
    def key(self) -> str: ...
    def place(self) -> bool:
        """Return whether it has a place, which it takes now if one is free."""

    def release(self) -> None: ...


class Drafter(Protocol):
    """Drafts the next tokens of a sequence, as `speculation.NgramDrafter` does."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]: ...
    def learn(self, num_tokens: int, num_accepted: int) -> None: ...


@dataclass(slots=True, eq=False)
class Completion:
    """One of a request's `n` sequences.

    constraint: its place in the grammar of its request.
    follows_text: its text grows with every token, because somebody reads it, or it may end in a
        stop string; else it is written at the end.
    token_time: when its newest token arrived, in seconds of the metrics' clock.
    told: characters, tokens and the ending that outputs of kind DELTA have had.
    num_written: tokens of the text, where it is not followed.
    drafter: looks up drafts of its next tokens; None: nothing has asked for one yet.
    """

    request: Request
    owner: RequestGroup
    output: CompletionOutput
    text: OutputText
    seed: int
    constraint: Constraint | None = None
    follows_text: bool = True
    token_time: float | None = None
    told: tuple[int, int, bool] = (0, 0, False)
    num_written: int = 0
    drafter: Drafter | None = None

    @property
    def generated(self) -> list[int]:
        return self.output.token_ids

    def take(
        self, result: Sampled, eos_token_ids: Sequence[int]
    ) -> tuple[str, str | int | None] | None:
        """Add a sampled token; return the finish and stop reason if the completion ends with it."""
        output, params = self.output, self.owner.params
        if params.max_tokens == 0:
            return "length", None
        token, token_ids = result.token_id, self.request.token_ids
        token_ids.append(token)
        output.token_ids.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        output.cumulative_logprob += result.logprob
        may_stop = len(output.token_ids) >= params.min_tokens
        is_eos = may_stop and token in eos_token_ids and not params.ignore_eos
        is_end = is_eos or (may_stop and token in params.stop_token_ids)
        shown = not is_end or params.include_stop_str_in_output
        stop, most = None, self.request.max_num_tokens
        if self.follows_text:
            # as in vLLM, a stop string ends with a token after the first `min_tokens`
            may_stop = not is_end and len(output.token_ids) > params.min_tokens
            stop = self._follow(result, shown=shown, may_stop=may_stop)
        ending: tuple[str, str | int | None] | None = None
        if is_end:
            ending = "stop", None if is_eos else token
        elif stop is not None:
            ending = "stop", stop
        elif self.constraint is not None and self.constraint.ended:
            ending = "stop", None
        elif most is not None and len(token_ids) >= most:
            ending = "length", None
        elif params.repetition_detection and params.repetition_detection.ends(output.token_ids):
            ending = "repetition", "repetition_detected"
        if ending is not None:
            self.write_text(None if shown else -1)
            if stop is None:
                self.text.finish()
            output.text = self.text.text
        return ending

    def _follow(self, result: Sampled, *, shown: bool, may_stop: bool) -> str | None:
        """Add a token's text and log-probabilities; return the stop string that ends the text.

        Args:
            shown: the text has the token.
        """
        output, text = self.output, self.text
        if not shown:
            text.finish()
        if output.logprobs is not None and result.logprobs is not None:
            output.logprobs.append(
                {t: text.logprob(t, p, r) for t, (p, r) in result.logprobs.items()}
            )
        if output.text_offsets is not None:
            output.text_offsets.append(text.offset_of(result.token_id))
        stop = text.append(result.token_id, may_stop=may_stop) if shown else None
        output.text = text.text
        return stop

    def write_text(self, end: int | None = None) -> None:
        """Add the text of the tokens before place `end`, of an output whose text none followed."""
        if not self.follows_text:
            new = self.output.token_ids[self.num_written : end]
            self.num_written += len(new)  # first, as a tokenizer may raise
            self.text.extend(new)
            self.output.text = self.text.text

    def settled_text(self) -> str:
        """Return the text that no later stop string can remove."""
        self.write_text()
        return self.text.settled()

    def take_piece(self) -> CompletionOutput | None:
        """Return what no earlier piece had; None if there is nothing."""
        output, (num_chars, num_tokens, told_end) = self.output, self.told
        ended = output.finish_reason is not None
        text = output.text if ended else self.text.settled()
        if told_end or (not ended and len(text) <= num_chars and len(self.generated) <= num_tokens):
            return None
        self.told = max(num_chars, len(text)), len(self.generated), ended
        tables, offsets = output.logprobs, output.text_offsets
        return replace(
            output,
            text=text[num_chars:],
            token_ids=output.token_ids[num_tokens:],
            logprobs=None if tables is None else tables[num_tokens:],
            text_offsets=None if offsets is None else offsets[num_tokens:],
        )


@dataclass(slots=True, eq=False)
class RequestGroup:
    """A user's request: `n` completions of one prompt.

    bad_words: token ids of what the output must not have.
    grammar: what its outputs have to match.
    adapter: the LoRA adapter that it holds until it is forgotten.
    forked: the first completion's prompt is computed, and all completions have sampled from it.
    starting_siblings: the other completions have no sequence of their own yet.
    prompt_logprobs: the table of each token of the prompt, once it is computed, if asked for.
    tells_all: outputs tell of the request before its end.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    bad_words: Sequence[Sequence[int]] = ()
    grammar: Grammar | None = None
    adapter: Adapter | None = None
    completions: list[Completion] = field(default_factory=list)
    forked: bool = False
    starting_siblings: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: SpectralPagedError | None = None
    tells_all: bool = field(init=False)

    def __post_init__(self) -> None:
        self.tells_all = self.params.output_kind is not RequestOutputKind.FINAL_ONLY

    def add_completion(
        self,
        index: int,
        tokens: TokenBytes | None,
        *,
        max_num_tokens: int,
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
            max_num_tokens,
            cache_salt=cache_salt,
            pinned_spans=pinned_spans,
            may_start=None if self.adapter is None else self.adapter.place,
        )
        text = OutputText(
            tokens if params.detokenize else None,
            prompt=prompt,
            stop=params.stop_strings,
            keep_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        output = CompletionOutput(index)
        if params.wanted is not None:
            output.logprobs, output.text_offsets = [], []
        constraint = None
        if self.grammar is not None:
            constraint = self.grammar.start(ignore_ends=params.ignore_eos)
        reads = self.tells_all and params.detokenize
        follows = reads or bool(params.stop_strings) or params.wanted is not None
        made = Completion(request, self, output, text, seed, constraint, follows)
        self.completions.append(made)
        return made

    @property
    def finished(self) -> bool:
        return None not in [c.output.finish_reason for c in self.completions]

    def news(self) -> RequestOutput | None:
        """Return what the request's `output_kind` tells of it now, or None for nothing."""
        kind = self.params.output_kind
        if kind is RequestOutputKind.CUMULATIVE:
            return self.result([c.output for c in self.completions])
        if kind is RequestOutputKind.DELTA:
            pieces = [piece for c in self.completions if (piece := c.take_piece()) is not None]
            if not pieces and not self.finished:
                return None
            found, self.prompt_logprobs = self.result(pieces), None  # they are told once
            return found
        return self.result([c.output for c in self.completions]) if self.finished else None

    def result(self, outputs: list[CompletionOutput]) -> RequestOutput:
        """Return the request's output with the given completions."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=self.metrics,
            error=self.error,
            prompt_logprobs=self.prompt_logprobs,
        )


def unserved(completion: Completion, what: str, cause: BaseException) -> RequestFailedError:
    """Return the error of a request that failed while `what` happened."""
    error = RequestFailedError(
        f"request {shown(completion.owner.request_id)} failed while {what}, after "
        f"{len(completion.request.token_ids)} tokens: {shown(cause)}"
    )
    error.__cause__ = cause
    return error


def no_token(completion: Completion) -> InvalidRequestError:
    """Return the error of a request of which no token may come next."""
    return InvalidRequestError(
        f"request {shown(completion.owner.request_id)} allows no token after "
        f"{len(completion.generated)} generated ones: its allowed_token_ids, bad_words, "
        "logit_bias, structured_outputs and min_tokens exclude each other"
    )


def seed_of(params: SamplingParams, otherwise: str, index: int) -> int:
    """Derive the seed of completion `index` from the request's seed or the string `otherwise`.

    A negative seed is none, as in vLLM.
    """
    has_seed = params.seed is not None and params.seed >= 0
    base = params.seed if has_seed else otherwise
    digest = hashlib.sha256(f"{base}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
