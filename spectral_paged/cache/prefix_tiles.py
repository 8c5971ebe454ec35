"""Tiles of a decode step's sequences: those that begin with the same pages read them together.

Prefix hits and forks make sequences hold the same slots, so their page table rows begin alike. The
tables alone say who shares what, and nobody has to note a fork, a preemption or an abort.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from spectral_paged.pool.block_table import BlockTable

Array = np.ndarray[Any, Any]

MIN_PAGES = 4  # shared by a group at least; each tile costs launches and a merge
MOST_READS = 0.75  # of the page reads of a step without tiles; above it a step has none


@dataclass(frozen=True, slots=True)
class TiledReads:
    """The tiles of a step of N sequences, as `kernels.decode.shared_pages.SharedPages` takes them.

    columns: int32 `[2, N]`, its `seats` and `starts`.
    own_entries: page table entries that sequences read themselves, together.
    tile_entries: those that tiles read, together.
    pages_saved: page reads that the step does not do because of tiles, in one layer.
    """

    columns: Array
    own_entries: int
    tile_entries: int
    pages_saved: int


@dataclass(slots=True)
class _Span:
    """Neighbours in the order of their table rows, from `first` on, that share `depth` entries.

    `saved` and `groups` are what is best for its parts that share more.
    """

    depth: int
    first: int
    saved: int
    groups: list[tuple[int, int, int]]


def _seating(num_members: int, seats: int) -> tuple[int, int]:
    """The tiles of a group, and how many of its members sit in them; no tile has a single one."""
    num_tiles = min(-(-num_members // seats), num_members // 2)
    return num_tiles, min(num_members, num_tiles * seats)


def best_groups(common: list[int], seats: int) -> list[tuple[int, int, int]]:
    """The groups `(first, end, depth)` of sorted rows that save the most reads of table entries.

    A row is in one group at most. Rows of a group share `depth` entries.

    Args:
        common: the leading entries that each row shares with the next one.
        seats: rows of a tile.
    """
    open_spans = [_Span(0, 0, 0, [])]
    for end, depth in enumerate([*common, 0], start=1):
        first, closed = end - 1, _Span(0, 0, 0, [])
        while open_spans[-1].depth > depth:
            span = open_spans.pop()
            span.saved += closed.saved
            span.groups += closed.groups
            num_tiles, seated = _seating(end - span.first, seats)
            together = (seated - num_tiles) * span.depth
            if together >= span.saved:
                span.saved, span.groups = together, [(span.first, end, span.depth)]
            first, closed = span.first, span
        if open_spans[-1].depth < depth:
            open_spans.append(_Span(depth, first, 0, []))
        open_spans[-1].saved += closed.saved
        open_spans[-1].groups += closed.groups
    return open_spans[0].groups


class PrefixTiles:
    """Finds the tiles of a layer group's decode steps, and keeps them while nothing changes.

    A steady step compares its rows and the table's number of writes with those of the last one.

    Args:
        table: the group's page table.
        seats: most sequences of a tile, at least 2.
    """

    def __init__(self, table: BlockTable, seats: int) -> None:
        assert seats >= 2, "a tile of one sequence shares nothing"
        self.seats = seats
        self._table = table
        self._rows = np.zeros(0, np.int64)
        self._num_writes = -1
        self._found: TiledReads | None = None

    def of(self, rows: Array, blocks: Array) -> TiledReads | None:
        """The tiles of the sequences in `rows`, which read `blocks` entries each; None: too little
        is shared.

        Args:
            rows, blocks: int `[N]`, of the page table.
        """
        same = rows is self._rows or np.array_equal(rows, self._rows)
        if same and self._num_writes == self._table.num_writes:
            return self._found
        self._rows, self._num_writes = rows, self._table.num_writes
        self._found = self._tiled(rows, blocks)
        return self._found

    def _tiled(self, rows: Array, blocks: Array) -> TiledReads | None:
        host = self._table.host.numpy()
        able = (blocks >= MIN_PAGES).nonzero()[0]
        first = host[rows[able], 0].tolist()
        if len(set(first)) == len(first):
            return None
        held = host[rows[able], : int(blocks.max())]
        # bytes are compared, whose order is another one than that of the integers
        lines = [line.tobytes() for line in held]
        order = np.array(sorted(range(len(lines)), key=lines.__getitem__))
        held, places, counts = held[order], able[order], blocks[able][order]
        differs = held[1:] != held[:-1]
        alike = np.where(differs.any(axis=1), differs.argmax(axis=1), held.shape[1])
        common = np.minimum(alike, np.minimum(counts[1:], counts[:-1]))
        common[common < MIN_PAGES] = 0
        columns = np.zeros((2, len(rows)), np.int32)
        num_tiles = tile_entries = pages_saved = 0
        for begin, end, depth in best_groups(common.tolist(), self.seats):
            tiles, seated = _seating(end - begin, self.seats)
            members = np.sort(places[begin:end])[:seated]
            edges = np.linspace(0, seated, tiles + 1).astype(int).tolist()
            for start, stop in pairwise(edges):
                sitting = members[start:stop]
                columns[0, sitting] = 1 + num_tiles * self.seats + np.arange(stop - start)
                columns[1, sitting] = depth
                num_tiles += 1
            tile_entries += tiles * depth
            pages_saved += (seated - tiles) * int((held[begin, :depth] >= 0).sum())
        own_entries = int(blocks.sum() - columns[1].sum())
        if own_entries + tile_entries > MOST_READS * int(blocks.sum()):
            return None
        return TiledReads(columns, own_entries, tile_entries, pages_saved)
