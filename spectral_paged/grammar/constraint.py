"""A grammar over a vocabulary, and the place in it where a completion stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectral_paged.errors import cut, refusal


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar, from whose beginning any number of completions start.

    Attributes:
        matcher: llguidance's, at the beginning; it is only copied.
        executor: llguidance's threads, which fill the masks of several completions.
        num_tokens: of the vocabulary; the next id stands for the end.
        end_tokens: ids that end a completion.
    """

    matcher: Any
    executor: Any
    num_tokens: int
    end_tokens: Sequence[int]

    def start(self, *, ignore_ends: bool = False) -> Constraint:
        """Return a place of its own at the beginning.

        Args:
            ignore_ends: no end token may come; the completion ends where nothing may follow.
        """
        return Constraint(self, () if ignore_ends else self.end_tokens)


class Constraint:
    """The place in a grammar behind the tokens that a completion has.

    Args:
        grammar: what the completion has to match.
        end_tokens: ids that may come where the grammar may end.
    """

    def __init__(self, grammar: Grammar, end_tokens: Sequence[int]) -> None:
        self._end, self._end_tokens = grammar.num_tokens, end_tokens
        self._matcher, self._executor = grammar.matcher.deep_copy(), grammar.executor
        self._line = np.zeros(grammar.num_tokens // 32 + 1, dtype=np.int32)
        self._is_filled = False  # the line is the mask of this place, but for end tokens

    def allowed(self) -> np.ndarray[Any, Any]:
        """Return the tokens that may come next: a bit for each, in int32 words.

        End tokens are among them where the grammar may end. The array is valid until `accept`.

        Raises:
            InvalidRequestError: the grammar became too large, or no token may follow.
        """
        line = self._line
        if not self._is_filled:
            self._matcher.unsafe_compute_mask_ptr(line.ctypes.data, line.nbytes)
            self._is_filled = True
        self._check()
        bits = line.view(np.uint32)
        if bits[self._end // 32] >> (self._end % 32) & 1:
            for token in self._end_tokens:
                bits[token // 32] |= np.uint32(1 << token % 32)
        return line

    @staticmethod
    def fill(places: Iterable[Constraint]) -> None:
        """Fill the masks of several completions of one engine at once, on threads of llguidance.

        `allowed` then only returns them. A grammar that is ambiguous takes milliseconds a mask.
        """
        empty = [place for place in places if not place._is_filled]
        if len(empty) < 2:  # `allowed` does it without another thread
            return
        lines = np.zeros((len(empty), len(empty[0]._line)), dtype=np.int32)
        work = [(place._matcher, row) for row, place in enumerate(empty)]
        empty[0]._executor.unsafe_compute_mask_ptr(
            work, lines.ctypes.data, lines[0].nbytes, len(lines)
        )
        for place, line in zip(empty, lines, strict=True):
            place._line, place._is_filled = line, True

    def accept(self, token_id: int) -> None:
        """Go on behind a token.

        Raises:
            InvalidRequestError: the grammar does not have it here, or became too large.
        """
        if token_id in self._end_tokens and self._matcher.is_accepting():
            return
        self._is_filled = False
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def ended(self) -> bool:
        """True if nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            why = cut(str(self._matcher.get_error()).partition("\n<state>")[0])
            raise refusal(f"structured_outputs cannot go on: {why}", "structured_outputs")
