"""What every engine is asked: facts in long contexts, and the next token at places of real text.

A question follows its context in the same prompt, as a user would send it. Contexts are as long as
`Haystack.sealed_length` says, so that where a segment ends there too, everything in them but the
newest tokens is seen as pages by the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, islice

from spectral_paged.benchmarks.quality.tasks import (
    Haystack,
    continuation_windows,
    needle_probes,
)

ANSWER_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt; `answer` is that of a needle, None at a place of real text.

    context: the number of its context; requests of one context share a prefix.
    place: the tokens of real text between the context and the token that is judged.
    """

    context: int
    length: int
    genre: str
    prompt_token_ids: tuple[int, ...]
    answer: str | None = None
    place: int = 0

    @property
    def num_answer_tokens(self) -> int:
        return 1 if self.answer is None else ANSWER_TOKENS


def requests(
    hay: Haystack, lengths: Sequence[int], *, needles: int, windows: int, places: int
) -> list[Request]:
    """The requests of all lengths.

    Args:
        needles: facts asked for, at each length.
        windows: contexts of real text, at each length.
        places: tokens judged after each of them.

    Raises:
        InvalidRequestError: no text is long enough, or a length is beyond the model's.
    """
    numbers, found = count(), []
    for length in lengths:
        rounds = chain.from_iterable(needle_probes(hay, [length], round) for round in count())
        asked: list[Request] = []
        while len(asked) < needles:
            probe, number = next(rounds), next(numbers)
            asked += [
                Request(number, length, probe.genre, (*probe.context, *q.prompt), q.answer)
                for q in islice(probe.questions, needles - len(asked))
            ]
        found += asked
        judged = continuation_windows(hay, length, windows, places) if windows else []
        for window in judged:
            number = next(numbers)
            found += [
                Request(
                    number,
                    length,
                    window.genre,
                    (*window.context, *window.continuation[:place]),
                    place=place,
                )
                for place in range(1, places + 1)
            ]
    return found
