"""The records in which tiers below the pool keep sequences: runs of tokens, and anchors.

```
tokens      landmarks | block 0 | block 1 | block 2 | block 3 .......  T
runs                    [ run 0 ] [ run 1 ] [ run 2 ]                      pages of all layers
anchor at T [        ]                                [                ]   what a query at T sees
                                                                           exactly, and windows
```

A sequence that goes on at T needs the runs that a query at T sees as pages, and the anchor at T.
In `exact` a run is a span of 64 tokens, and an anchor has windows only (decision 0041).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.token_places import PAGES_PER_BLOCK, TokenPlaces
from spectral_paged.cache.visibility import NEVER, Visibility
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.pool.slot_pool import SlotKind


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of one slot in all layers of the group at `place`, and the key that finds it."""

    place: int
    kind: SlotKind
    digest: bytes

    @property
    def slot_key(self) -> tuple[SlotKind, bytes]:
        return self.kind, self.digest


@dataclass(frozen=True, slots=True)
class Record:
    """Slots that are kept together; `parent` is the key of the record before it in its chain."""

    key: bytes
    parent: bytes | None
    parts: tuple[Part, ...]
    num_tokens: int


class Records:
    """The records of a cache's sequences.

    Args:
        groups: the cache's layer groups.
        visibility: the rule for the blocks that queries see as pages.
    """

    def __init__(self, groups: Sequence[LayerGroup], visibility: Visibility) -> None:
        self._groups = groups
        self._visibility = visibility
        self.seals = visibility.hot < NEVER  # else each span of 64 tokens is a run
        self._slides = any(group.window is not None for group in groups)
        self._landmarks = visibility.landmarks if self.seals else 0
        self._run_pages = PAGES_PER_BLOCK if self.seals else 1

    def num_runs(self, num_tokens: int) -> int:
        """The number of whole runs among the first `num_tokens` tokens."""
        past = max(0, num_tokens - self._landmarks)
        return past // (self._run_pages * EXACT_PAGE_TOKENS)

    def num_tokens(self, num_runs: int) -> int:
        """The number of tokens up to the end of the first `num_runs` runs."""
        return self._landmarks + num_runs * self._run_pages * EXACT_PAGE_TOKENS if num_runs else 0

    def runs_before(self, num_tokens: int) -> int:
        """The number of runs that a sequence needs to go on after `num_tokens` tokens."""
        if self.seals:
            return self._visibility.visible_blocks(num_tokens, num_tokens + 1)
        return self.num_runs(num_tokens)

    def hit_points(self, most: int) -> Iterator[int]:
        """The numbers of tokens, at most `most`, after which a prompt may go on; longest first."""
        if not self.seals:
            yield from range(most // EXACT_PAGE_TOKENS * EXACT_PAGE_TOKENS, 0, -EXACT_PAGE_TOKENS)
            return
        first, segment = self._landmarks, self._visibility.segment
        for point in range(first + max(0, most - first) // segment * segment, first, -segment):
            if self.runs_before(point) > self._visibility.visible_blocks(point - 1, point):
                yield point  # a chunk ends here, because the view changes

    def run(self, chain: PrefixChain, number: int, pinned: tuple[int, ...]) -> Record | None:
        """The record of a run, which layers without a window share; None if there is none, or if
        the chain does not reach so far."""
        first = self._landmarks // EXACT_PAGE_TOKENS + number * self._run_pages
        spans = range(first, first + self._run_pages)
        if spans[-1] >= len(chain):
            return None
        parts = []
        for place, group in enumerate(self._groups):
            if group.window is not None:
                continue
            if group.seals and number not in pinned:
                parts.append(Part(place, SlotKind.PAGE, chain[spans[-1]]))
            else:
                parts += [Part(place, SlotKind.EXACT, chain[index]) for index in spans]
        return Record(
            _key(b"run", chain[spans[-1]]),
            _key(b"run", chain[first - 1]) if number else None,
            tuple(parts),
            len(spans) * EXACT_PAGE_TOKENS,
        )

    def anchor(self, chain: PrefixChain, num_tokens: int, pinned: tuple[int, ...]) -> Record:
        """The record of what a sequence needs beside runs to go on after `num_tokens` tokens."""
        runs = self.runs_before(num_tokens)
        in_runs = range(0)
        if runs:
            first = self._landmarks // EXACT_PAGE_TOKENS
            in_runs = range(first, first + runs * self._run_pages)
        parts: list[Part] = []
        for place, group in enumerate(self._groups):
            kept = group.retention
            places = TokenPlaces(
                kept.num_landmark_pages,
                pinned if kept.seals else (),
                first_page=kept.first_page(num_tokens),
            )
            sealed = kept.num_sealed(runs if self.seals else 0)
            if group.window is not None:
                parts += [
                    Part(place, SlotKind.PAGE, chain[places.last_index(block)])
                    for block in places.unpinned(range(places.first_block, sealed))
                ]
            parts += [
                Part(place, SlotKind.EXACT, chain[index])
                for index in range(places.first_page, num_tokens // EXACT_PAGE_TOKENS)
                if not (
                    places.is_hidden(index, sealed)
                    if group.window is not None
                    else index in in_runs
                )
            ]
        tokens = num_tokens - len(in_runs) * EXACT_PAGE_TOKENS
        return Record(*self.anchor_keys(chain, num_tokens), tuple(parts), tokens)

    def anchor_keys(self, chain: PrefixChain, num_tokens: int) -> tuple[bytes, bytes | None]:
        """The keys of the anchor after `num_tokens` tokens and of the record before it."""
        runs = self.runs_before(num_tokens)
        last = self.num_tokens(runs) // EXACT_PAGE_TOKENS - 1
        key = _key(b"anchor", chain[num_tokens // EXACT_PAGE_TOKENS - 1])
        return key, _key(b"run", chain[last]) if runs else None

    def num_bytes(self, record: Record) -> int:
        """The bytes of a record."""
        return sum(self.part_bytes(part) for part in record.parts)

    def part_bytes(self, part: Part) -> int:
        arena = self._groups[part.place].arena
        return arena.slot_bytes(part.kind) * arena.num_layers

    def sizes(self, max_model_len: int) -> tuple[int, int]:
        """The bytes of the largest record without pinned blocks, and of a usual one; 0 if no prompt
        of `max_model_len` tokens is kept."""
        chain = _AnyChain()
        point = next(self.hit_points(max_model_len - 1), None)
        if point is None:
            return 0, 0
        run = self.run(chain, 0, ())
        assert run is not None, "the chain has any length"
        found = [self.num_bytes(record) for record in (run, self.anchor(chain, point, ()))]
        return max(found), found[0] or found[1]


class _AnyChain(PrefixChain):
    """A chain of any length, for records whose size alone counts."""

    def __init__(self) -> None:
        super().__init__("", 0, generated_differ=False)

    def __len__(self) -> int:
        return NEVER

    def __getitem__(self, index: int) -> bytes:
        return b""


def _key(kind: bytes, digest: bytes) -> bytes:
    return kind + digest
