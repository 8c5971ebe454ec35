"""Beam search over forks: sequences that share a beginning share its slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectral_paged.device import Download
from spectral_paged.engine.adapters import held, prefix_salt
from spectral_paged.engine.admission import check_request
from spectral_paged.engine.engine import Engine
from spectral_paged.engine.prompts import Prompt, parts_of
from spectral_paged.engine.turns import Turns
from spectral_paged.errors import (
    CapacityError,
    InvalidRequestError,
    NonFiniteError,
    SpectralPagedError,
)
from spectral_paged.options import LoRARequest
from spectral_paged.outputs import BeamSearchSequence, Logprob
from spectral_paged.sampling import BeamSearchParams, SamplingParams

_numbers = itertools.count()


@dataclass(slots=True)
class _Beam:
    """A sequence that goes on: the cache has all of its tokens but the last one.

    seq_id: its sequence in the cache; the parent's, until it has one of its own.
    """

    seq_id: str
    tokens: list[int]
    cum_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


class BeamSearch:
    """One prompt's beam search, run a step at a time between the steps of its engine.

    A step computes one token of each beam, and takes the `2 * beam_width` most probable tokens
    behind each. Those that end are kept aside, and the best others go on: the first child of a beam
    has its sequence, and further ones fork it. A score is the sum of log-probabilities over
    `length ** length_penalty`, where the length is that of prompt and output without an end token.

    Args:
        engine: its cache has a seat for each beam; nobody steps it while `step` runs.
        prompt: token ids.
        cache_salt: as in `Engine.add_request`.
        lora_request: the LoRA adapter of all beams, held until `close`.

    Attributes:
        finished: `result` is known.

    Raises:
        AdapterError: the adapter cannot be loaded.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        params: BeamSearchParams,
        cache_salt: str = "",
        lora_request: LoRARequest | None = None,
    ) -> None:
        self._engine, self._params = engine, params
        self._num_prompt = len(prompt)
        self._beams = [_Beam(self._name(), list(prompt))]
        self._ended: list[BeamSearchSequence] = []
        self._started = self.finished = False
        longest = min(engine.cache.max_model_len, len(prompt) + params.max_tokens)
        self._num_left = longest - len(prompt)
        self._adapter = held(engine.adapters, lora_request)
        self._salt = prefix_salt(cache_salt, self._adapter)
        self._error: SpectralPagedError | None = None
        engine.requests.searches.add(self)

    @classmethod
    def of_prompt(
        cls,
        engine: Engine,
        prompt: Prompt,
        params: BeamSearchParams,
        turns: Turns,
        lora_request: LoRARequest | None = None,
    ) -> list[BeamSearchSequence]:
        """Search one prompt, in turns with other callers, and return the best sequences.

        Raises:
            SpectralPagedError: the prompt can never be served, or the beams do not fit.
        """
        body, salt, pinned = parts_of(prompt)
        if pinned:
            raise InvalidRequestError("a beam search takes no pinned_spans: leave them out")
        with turns:
            engine.sleep.check()
            tokens = engine.prompt_encoder.encode(body)
            as_request = SamplingParams(max_tokens=params.max_tokens)
            check_request(engine.cache, tokens, as_request, (), None)
            search = cls(engine, tokens, params, salt, lora_request)
        return search.run(turns)

    def run(self, turns: Turns) -> list[BeamSearchSequence]:
        """Run all steps, each in its turn with other callers, and return the best sequences.

        Raises:
            SpectralPagedError: as `step` does.
        """
        try:
            while not self.finished:
                with turns:
                    self.step()
        finally:
            with turns:
                self.close()
        return self.result()

    def step(self) -> None:
        """Compute the next tokens of all beams; nothing where the search is finished.

        Raises:
            CapacityError: the cache has no room for the beams beside what else is in it.
            NonFiniteError: the logits have NaN or Inf.
            SpectralPagedError: the engine sleeps.
        """
        if self.finished:
            return
        try:
            self._engine.sleep.check()
            logits = self._next_logits()
            self._go_on(logits)
        except BaseException:
            self.close()
            raise

    def result(self) -> list[BeamSearchSequence]:
        """Return the best `beam_width` sequences so far, the best first.

        Raises:
            SpectralPagedError: the search failed, as `fail` was told.
        """
        if self._error is not None:
            raise self._error
        going = [self._sequence(beam, "length") for beam in self._beams]
        ranked = sorted([*self._ended, *going], key=self._score, reverse=True)
        tokens = self._engine.token_bytes
        best = ranked[: self._params.beam_width]
        for found in best:
            if tokens is not None:
                found.text = tokens.text(found.tokens, skip_special_tokens=False)
        return best

    def fail(self, error: SpectralPagedError) -> None:
        """End the search with an error, which `result` raises."""
        self._error = error
        self.close()

    def close(self) -> None:
        """Free the beams' sequences and their adapter; may be called more than once."""
        self.finished = True
        self._engine.requests.searches.discard(self)
        if self._adapter is not None:
            self._adapter.release()
            self._adapter = None
        for beam in self._beams:
            if beam.seq_id in self._engine.cache:
                self._engine.cache.free(beam.seq_id)

    # ---- one step ------------------------------------------------------------------------

    def _next_logits(self) -> Tensor:
        """Return the logits behind each beam, `[beams, vocab]`."""
        if self._started:
            return self._run({beam.seq_id: beam.tokens[-1:] for beam in self._beams})
        self._started = True
        (beam,) = self._beams
        cache, most = self._engine.cache, self._engine.scheduler.token_budget
        added = cache.add_sequence(
            beam.seq_id,
            num_prompt_tokens=self._num_prompt,
            token_ids=beam.tokens,
            cache_salt=self._salt,
        )
        if added is None:
            raise self._no_room()
        while True:
            start = cache.num_tokens(beam.seq_id)
            end = min(start + min(cache.chunk_limit(beam.seq_id), most), self._num_prompt)
            logits = self._run({beam.seq_id: beam.tokens[start:end]})
            if end == self._num_prompt:
                return logits

    def _run(self, tokens: dict[str, list[int]]) -> Tensor:
        """Run the model over new tokens of sequences; return the logits behind each."""
        cache = self._engine.cache
        plan = cache.reserve({seq_id: len(new) for seq_id, new in tokens.items()})
        if plan is None:
            raise self._no_room()
        rows = [row - 1 for row in itertools.accumulate(map(len, tokens.values()))]
        flat = [token for new in tokens.values() for token in new]
        try:
            cache.begin_step(plan)
            if self._adapter is None:
                logits = self._engine.runner.forward(plan, flat, rows).clone()
            else:
                own = [self._adapter.index] * len(tokens)
                logits = self._engine.runner.forward(plan, flat, rows, adapters=own).clone()
            report = cache.end_step()
        except BaseException:
            cache.abort_step()
            raise
        for error in report.failed.values():
            raise error
        return logits

    def _go_on(self, logits: Tensor) -> None:
        """Extend the beams by the best tokens behind them, and end those that end."""
        eos = () if self._params.ignore_eos else self._engine.eos_token_ids
        candidates: list[tuple[int, BeamSearchSequence]] = []
        self._num_left -= 1
        for parent, (beam, table) in enumerate(zip(self._beams, self._tables(logits), strict=True)):
            for token, found in table.items():
                made = BeamSearchSequence(
                    [*beam.tokens, token],
                    [*beam.logprobs, table],
                    beam.cum_logprob + found.logprob,
                )
                if token in eos:
                    made.finish_reason = "stop"
                    self._ended.append(made)
                else:
                    candidates.append((parent, made))
        candidates.sort(key=lambda pair: self._score(pair[1]), reverse=True)
        chosen = candidates[: self._params.beam_width]
        if self._num_left and chosen:
            self._move(chosen)
            return
        self.close()
        self._beams = [_of(made, "") for _, made in chosen]

    def _move(self, chosen: Sequence[tuple[int, BeamSearchSequence]]) -> None:
        """Give each chosen sequence a beam: its parent's, or a fork of it."""
        cache, before = self._engine.cache, self._beams
        parents = {parent for parent, _ in chosen}
        for place, beam in enumerate(before):
            if place not in parents:  # first, because forks need seats
                cache.free(beam.seq_id)
        self._beams = [before[place] for place in sorted(parents)]  # what `close` frees
        taken: set[int] = set()
        moved = []
        for parent, made in chosen:
            beam = _of(made, before[parent].seq_id)
            if parent in taken:
                beam.seq_id = self._name()
                forked = cache.fork(
                    before[parent].seq_id,
                    beam.seq_id,
                    token_ids=beam.tokens,
                    cache_salt=self._salt,
                )
                if not forked:
                    raise self._no_room()
                self._beams.append(beam)
            else:
                taken.add(parent)
            moved.append(beam)
        for parent, beam in zip([parent for parent, _ in chosen], moved, strict=True):
            if beam.seq_id == before[parent].seq_id:  # the cache reads the list that it was given
                before[parent].tokens.append(beam.tokens[-1])
                beam.tokens = before[parent].tokens
        self._beams = moved

    def _tables(self, logits: Tensor) -> list[dict[int, Logprob]]:
        """Return the `2 * beam_width` most probable tokens behind each beam."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        top = logprobs.topk(min(2 * self._params.beam_width, logits.shape[-1]), dim=-1)
        ids, values = Download(top.indices, top.values).get()
        if not torch.isfinite(values).all():
            raise NonFiniteError(
                f"the logits of a beam have NaN or Inf after {len(self._beams[0].tokens)} tokens: "
                "check the model's dtype and weights"
            )
        tokens = self._engine.token_bytes
        found = []
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True):
            table = {}
            for rank, (token, value) in enumerate(zip(row_ids, row_values, strict=True), start=1):
                data = b"" if tokens is None else tokens.of(token, None)
                table[token] = Logprob(value, rank, data.decode("utf-8", "replace"), data)
            found.append(table)
        return found

    # ---- parts ---------------------------------------------------------------------------

    def _score(self, found: BeamSearchSequence) -> float:
        length = len(found.tokens) - (found.tokens[-1] in self._engine.eos_token_ids)
        return float(found.cum_logprob / length**self._params.length_penalty)

    def _no_room(self) -> CapacityError:
        return CapacityError(
            f"the cache has no room for {len(self._beams)} beams of {self._params.beam_width} "
            f"after {len(self._beams[0].tokens)} tokens: lower beam_width, or raise "
            "kv_cache_bytes or max_num_seqs"
        )

    @staticmethod
    def _name() -> str:
        return f"beam-{next(_numbers)}"

    @staticmethod
    def _sequence(beam: _Beam, reason: str) -> BeamSearchSequence:
        return BeamSearchSequence(
            list(beam.tokens), beam.logprobs, beam.cum_logprob, finish_reason=reason
        )


def _of(made: BeamSearchSequence, seq_id: str) -> _Beam:
    return _Beam(seq_id, list(made.tokens), made.cum_logprob, made.logprobs)
