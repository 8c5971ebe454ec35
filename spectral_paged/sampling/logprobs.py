"""Log-probabilities of one token a row of logits, and of the tokens that a request asks for too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spectral_paged.device import Download, upload

ALL = -1  # as a number of tokens: the whole vocabulary


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens whose log-probabilities are returned besides the chosen one's.

    num_top: as many of the most probable ones; -1: all.
    token_ids: these too.
    """

    num_top: int = 0
    token_ids: tuple[int, ...] = ()

    def top(self, vocab_size: int) -> int:
        """Return the number of most probable tokens."""
        return vocab_size if self.num_top == ALL else min(self.num_top, vocab_size)


class Sampled(NamedTuple):
    """The token of one row; `logprobs` maps token id to (log-probability, rank).

    `token_id` is -1 where the row's parameters allow no token.
    """

    token_id: int
    logprob: float
    logprobs: dict[int, tuple[float, int]] | None = None


class LogitsVisitor(Protocol):
    """Is shown the logits of rows of a step that are too many to keep."""

    @property
    def rows(self) -> Sequence[int]:
        """The rows, as indices into the flat batch."""
        ...

    def visit(self, logits: Tensor) -> None:
        """Take the logits of the next rows, fp32 `[some, vocab]`."""
        ...


class TokenLogprobs:
    """Log-probabilities of the tokens `ids` under raw logits `[N, vocab]`, fp32.

    All is computed on the device when the object is made, and `get` copies it to the host.

    Args:
        ids: int64 `[N]`.
        wanted: for each row; None: the token's own log-probability only, and no table.
        empty: bool `[N, 1]`, True for rows that have no token; None: all have one.
    """

    def __init__(
        self,
        logits: Tensor,
        ids: Tensor,
        wanted: Sequence[Wanted | None],
        empty: Tensor | None = None,
    ) -> None:
        self._wanted = list(wanted)
        chosen = ids.unsqueeze(-1)
        picked = logits.gather(-1, chosen)
        total = logits.logsumexp(dim=-1, keepdim=True)
        kind = torch.isfinite(logits).all(dim=-1, keepdim=True).long()
        if empty is not None:
            kind *= 1 + empty.long()
        whole, real = [chosen, kind], [picked - total]
        asked = [w for w in wanted if w is not None]
        self._num_asked = len(asked)
        self._num_top = self._num_given = 0
        if asked:
            whole.append((logits > picked).sum(dim=-1, keepdim=True) + 1)
            self._num_top = max(w.top(logits.shape[-1]) for w in asked)
            self._num_given = max(len(w.token_ids) for w in asked)
        if self._num_top:
            top = logits.topk(self._num_top, dim=-1)
            whole.append(top.indices)
            real.append(top.values - total)
        if self._num_given:
            ranks, values = self._given(logits)
            whole.append(ranks)
            real.append(values - total)
        self._download = Download(torch.cat(whole, dim=-1), torch.cat(real, dim=-1))

    def _given(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return ranks and logits `[N, most given]` of the given tokens; of token 0 for fewer."""
        given = [() if w is None else w.token_ids for w in self._wanted]
        padded = [[*ids, *[0] * (self._num_given - len(ids))] for ids in given]
        values = logits.gather(-1, upload(padded, torch.long, logits.device))
        # a column at a time, because [N, most given, vocab] would not fit
        ranks = [(logits > column).sum(dim=-1) + 1 for column in values.split(1, dim=-1)]
        return torch.stack(ranks, dim=-1), values

    def __len__(self) -> int:
        return len(self._wanted)

    def get(self, start: int = 0, stop: int | None = None) -> list[Sampled | None]:
        """The results of rows `start ... stop`; None where a row's logits have NaN or Inf."""
        rows = slice(start, stop)
        whole, real = [part.numpy()[rows] for part in self._download.get()]
        ids, values = whole[:, 0].tolist(), real[:, 0].tolist()
        found: list[Sampled | None] = list(map(Sampled, ids, values))
        if self._num_asked:
            for row, wanted in enumerate(self._wanted[rows]):
                if wanted is not None:
                    table = self._table(wanted, whole[row].tolist(), real[row].tolist())
                    found[row] = Sampled(ids[row], values[row], table)
        for row in (whole[:, 1] != 1).nonzero()[0].tolist():
            found[row] = Sampled(-1, values[row]) if whole[row, 1] else None
        return found

    def _table(
        self, wanted: Wanted, ints: list[int], reals: list[float]
    ) -> dict[int, tuple[float, int]]:
        table = {ints[0]: (reals[0], ints[2])}
        num_top = wanted.top(self._num_top)  # the widest row has no more than the vocabulary
        best = zip(ints[3 : 3 + num_top], reals[1 : 1 + num_top], strict=True)
        for rank, (token, value) in enumerate(best, start=1):
            table.setdefault(token, (value, rank))
        ranks, values = ints[3 + self._num_top :], reals[1 + self._num_top :]
        for token, rank, value in zip(wanted.token_ids, ranks, values, strict=False):
            table.setdefault(token, (value, rank))
        return table
