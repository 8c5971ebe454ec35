"""Log-probabilities of prompts, from the logits of the steps that compute them.

The logits of a position are those of the token after it, so a prompt's first token has none.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_paged.cache import StepPlan
from spectral_paged.device import upload
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import NonFiniteError
from spectral_paged.outputs import Logprob
from spectral_paged.sampling import TokenLogprobs, Wanted
from spectral_paged.scheduler import Request

STEPS_IN_FLIGHT = 2  # whose results may not have reached the host


class ResultRows(NamedTuple):
    """Rows of results that a prompt shares with others of its step."""

    found: TokenLogprobs
    start: int
    stop: int


class PromptLogprobs:
    """The log-probabilities of one prompt's tokens, as far as steps have computed them.

    A step after a preemption computes no position again whose log-probabilities are known.

    Args:
        request: the sequence that computes the prompt. The prefix cache gives it no token whose
            logits are still to come.
        tokens: the bytes of tokens; None: they have no text.

    Attributes:
        num_known: number of positions whose logits a step has computed.
    """

    def __init__(
        self,
        request: Request,
        wanted: Wanted,
        tokens: TokenBytes | None,
        *,
        skip_special_tokens: bool,
    ) -> None:
        self.wanted = wanted
        self.num_known = 0
        self._request = request
        self._prompt = request.token_ids[: request.num_prompt_tokens]
        self._tokens, self._skip = tokens, skip_special_tokens
        self._behind: int | None = None  # the last token of the text before the next table
        self._tables: list[dict[int, Logprob] | None] = [None]
        self._fetched: deque[list[ResultRows]] = deque()  # an item a step, not in `_tables` yet
        self._read(self._prompt[0])
        request.max_cached_tokens = 0

    def missing(self, start: int, end: int) -> range:
        """The positions from `start` to `end` whose logits are wanted."""
        return range(max(start, self.num_known), min(end, len(self._prompt) - 1))

    def next_tokens(self, positions: range) -> list[int]:
        return self._prompt[positions.start + 1 : positions.stop + 1]

    def add(self, found: list[ResultRows], num_positions: int) -> None:
        """Add the results of a step for the next `num_positions` positions."""
        self._fetched.append(found)
        self.num_known += num_positions
        self._request.max_cached_tokens = self.num_known
        while len(self._fetched) > STEPS_IN_FLIGHT:
            self._take(self._fetched.popleft())

    def finish(self) -> list[dict[int, Logprob] | None]:
        """Return the table of each token of the prompt, None for the first one.

        Raises:
            NonFiniteError: logits have NaN or Inf.
        """
        self._request.max_cached_tokens = None
        while self._fetched:
            self._take(self._fetched.popleft())
        return self._tables

    def _take(self, parts: Iterable[ResultRows]) -> None:
        for found, start, stop in parts:
            for result in found.get(start, stop):
                place = len(self._tables)
                if result is None or result.logprobs is None:
                    raise NonFiniteError(
                        f"the logits of prompt token {place} have NaN or Inf: check the model's "
                        "dtype and weights"
                    )
                self._tables.append(
                    {t: self._entry(t, p, rank) for t, (p, rank) in result.logprobs.items()}
                )
                self._read(self._prompt[place])

    def _entry(self, token_id: int, logprob: float, rank: int) -> Logprob:
        if self._tokens is None:
            return Logprob(logprob, rank, "")
        data = self._tokens.of(token_id, self._behind)
        return Logprob(logprob, rank, data.decode("utf-8", "replace"), data)

    def _read(self, token_id: int) -> None:
        """Let the text go on with a token of the prompt."""
        tokens = self._tokens
        if tokens is None:
            return
        if tokens.shown(token_id, self._behind, skip_special_tokens=self._skip) is not None:
            self._behind = token_id


class PromptRows:
    """The rows of one step whose logits prompts want; a `LogitsVisitor`.

    Attributes:
        rows: indices into the flat batch, in order of sequences.
    """

    def __init__(self, plan: StepPlan, prompts: Mapping[str, PromptLogprobs]) -> None:
        self.rows: list[int] = []
        self._targets: list[int] = []
        self._wanted: list[Wanted] = []
        self._owners: list[tuple[PromptLogprobs, int]] = []  # and their number of rows
        self._found: list[TokenLogprobs] = []
        self._num_visited = 0
        begin = 0
        for entry in plan.entries:
            prompt = prompts.get(entry.seq_id)
            if prompt is not None:
                self._add(prompt, begin - entry.start, entry.start, entry.start + entry.num_new)
            begin += entry.num_new

    def _add(self, prompt: PromptLogprobs, shift: int, start: int, end: int) -> None:
        positions = prompt.missing(start, end)
        if positions:
            self.rows.extend(position + shift for position in positions)
            self._targets.extend(prompt.next_tokens(positions))
            self._wanted.extend([prompt.wanted] * len(positions))
            self._owners.append((prompt, len(positions)))

    def visit(self, logits: Tensor) -> None:
        """Reduce the logits of the next rows to what the prompts want of them."""
        rows = slice(self._num_visited, self._num_visited + len(logits))
        ids = upload(self._targets[rows], torch.long, logits.device)
        self._found.append(TokenLogprobs(logits, ids, self._wanted[rows]))
        self._num_visited = rows.stop

    def hand_out(self) -> None:
        """Give each prompt its results; not before the step's forward has returned."""
        assert self._num_visited == len(self.rows), "a runner shows a visitor all of its rows"
        bounds = list(itertools.accumulate(map(len, self._found), initial=0))
        begin = 0
        for prompt, count in self._owners:
            parts = [
                ResultRows(part, max(begin, first) - first, min(begin + count, last) - first)
                for part, (first, last) in zip(self._found, pairwise(bounds), strict=True)
                if first < begin + count and begin < last
            ]
            prompt.add(parts, count)
            begin += count
