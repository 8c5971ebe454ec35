"""The order in which a tier gives up records: the least recently used end of a chain first."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator


class ChainOrder:
    """Keys that follow each other in chains, and when each was last used.

    A record is of no use without those before it, so only the end of a chain is given up: a key
    that no other key follows.
    """

    def __init__(self) -> None:
        self._parent: dict[bytes, bytes | None] = {}
        self._used: dict[bytes, int] = {}
        self._followers: Counter[bytes] = Counter()  # of keys that are held, and of others
        # (used, key) of ends, oldest first; entries that are no longer true are skipped
        self._ends: list[tuple[int, bytes]] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._used)

    def add(self, key: bytes, parent: bytes | None) -> None:
        """Add a key behind `parent`, which may be unknown (yet), or None at a chain's beginning."""
        self._parent[key] = parent
        if parent is not None:
            self._followers[parent] += 1
        self.use([key])

    def use(self, keys: Iterable[bytes]) -> None:
        """Count keys as used now; unknown ones are left out."""
        self._clock += 1
        for key in keys:
            if key in self._parent:
                self._used[key] = self._clock
                self._note(key)
        if len(self._ends) > 4 * len(self._used) + 64:  # most entries are no longer true
            self._ends = [(used, k) for k, used in self._used.items() if not self._followers[k]]
            heapq.heapify(self._ends)

    def remove(self, key: bytes) -> None:
        """Remove a key, whatever follows it."""
        del self._used[key]
        parent = self._parent.pop(key)
        if parent is None:
            return
        self._followers[parent] -= 1
        if not self._followers[parent]:
            del self._followers[parent]
            self._note(parent)

    def _note(self, key: bytes) -> None:
        if key in self._used and not self._followers[key]:
            heapq.heappush(self._ends, (self._used[key], key))

    def oldest(self, may_go: Callable[[bytes], bool]) -> bytes | None:
        """The end of a chain that was used least recently, of those that `may_go`; None without
        one. The key stays until it is removed."""
        kept = []
        found = None
        while self._ends and found is None:
            entry = heapq.heappop(self._ends)
            used, key = entry
            if self._used.get(key) != used or self._followers[key]:
                continue
            kept.append(entry)
            if may_go(key):
                found = key
        for entry in kept:
            heapq.heappush(self._ends, entry)
        return found
