"""Stop strings of a growing text, all sought in one pass over its characters."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """An Aho-Corasick automaton: each character costs the same, whatever stops there are.

    A state is the longest end of the text that begins a stop; 0 is the empty one. Where a stop is
    complete and begins no longer one, the state is that of the longest shorter end.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # the state of the next shorter end that begins a stop
        self._complete: list[tuple[str, ...]] = [()]  # the stops that end here
        self._length = [0]
        for stop in dict.fromkeys(stops):
            state = 0
            for character in stop:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._shorter.append(0)
                    self._complete.append(())
                    self._length.append(self._length[state] + 1)
                state = self._next[state][character]
            self._complete[state] = (stop,)
        ahead = deque(self._next[0].values())
        while ahead:  # by length, as every state needs those of shorter ends
            state = ahead.popleft()
            self._complete[state] += self._complete[self._shorter[state]]
            for character, after in self._next[state].items():
                self._shorter[after] = self._follow(self._shorter[state], character)
                ahead.append(after)

    def _follow(self, state: int, character: str) -> int:
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._shorter[state]
        return self._next[state][character]

    def feed(self, state: int, text: str) -> tuple[int, list[tuple[int, str]]]:
        """Return the state behind `text`, and the stops that it completes.

        A stop comes with the place where it begins, counted from the beginning of `text`: below 0
        if that is before it.
        """
        found: list[tuple[int, str]] = []
        for end, character in enumerate(text, 1):
            state = self._follow(state, character)
            for stop in self._complete[state]:
                found.append((end - len(stop), stop))
            while state and not self._next[state]:
                state = self._shorter[state]
        return state, found

    def held(self, state: int) -> int:
        """Return how many characters at the end of the text may belong to a stop."""
        return self._length[state]


@lru_cache(maxsize=32)
def stop_strings(stops: tuple[str, ...]) -> StopStrings:
    """Return the automaton of `stops`, one for all completions that have the same."""
    return StopStrings(stops)
