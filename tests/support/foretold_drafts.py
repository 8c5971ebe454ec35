"""Drafts that know what comes, and are wrong now and then, so that some are accepted."""

from __future__ import annotations

import itertools
import random

SPECULATION = {"method": "ngram", "num_speculative_tokens": 7}


class ForetoldDrafts:
    """Drafts for one sequence, of 0 tokens up to as many as are asked for.

    Args:
        known: returns the tokens of the whole sequence, at least so many, or all if it ends before.
        vocab_size: a wrong token is another one of these.
        seed: of what is wrong.
    """

    def __init__(self, known, vocab_size, seed):
        self._known, self._vocab_size = known, vocab_size
        self._random = random.Random(seed)

    def draft(self, tokens, most):
        if most < 1:
            return []
        count = self._random.randint(0, most)
        found = list(self._known(len(tokens) + count)[len(tokens) : len(tokens) + count])
        found += [self._random.randrange(self._vocab_size) for _ in range(count - len(found))]
        if found and self._random.random() < 0.5:
            place = self._random.randrange(len(found))
            found[place] = (found[place] + 1) % self._vocab_size
        return found

    def learn(self, num_tokens, num_accepted):
        pass


def foretell(engine, known, vocab_size):
    """Give the requests to come drafts of what `known(completion, count)` says that they say."""

    numbers = itertools.count()
    engine.speculation.drafter_of = lambda completion: ForetoldDrafts(
        lambda count: known(completion, count), vocab_size, next(numbers)
    )
