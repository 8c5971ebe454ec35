"""A grammar over a vocabulary, and the place in it where a completion stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectral_paged.errors import cut, refusal


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar, from whose beginning any number of completions start.

    Attributes:
        matcher: llguidance's, at the beginning; it is only copied.
        num_tokens: of the vocabulary; the next id stands for the end.
        end_tokens: ids that end a completion.
    """

    matcher: Any
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
        self._matcher = grammar.matcher.deep_copy()
        self._line = np.zeros(grammar.num_tokens // 32 + 1, dtype=np.int32)

    def allowed(self) -> np.ndarray[Any, Any]:
        """Return the tokens that may come next: a bit for each, in int32 words.

        End tokens are among them where the grammar may end. The array is valid until the next call.

        Raises:
            InvalidRequestError: the grammar became too large, or no token may follow.
        """
        line = self._line
        self._matcher.unsafe_compute_mask_ptr(line.ctypes.data, line.nbytes)
        self._check()
        bits = line.view(np.uint32)
        if bits[self._end // 32] >> (self._end % 32) & 1:
            for token in self._end_tokens:
                bits[token // 32] |= np.uint32(1 << token % 32)
        return line

    def accept(self, token_id: int) -> None:
        """Go on behind a token.

        Raises:
            InvalidRequestError: the grammar does not have it here, or became too large.
        """
        if token_id in self._end_tokens and self._matcher.is_accepting():
            return
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
