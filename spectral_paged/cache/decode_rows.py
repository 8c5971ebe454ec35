"""The rows of a decode step: where each sequence's new token goes, and what its query reads.

From one token to the next a row changes by constants, until the token's page, or the page in which
its window begins, is another one. So rows are kept, and a step adds up what they moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.pool.block_table import BlockTable

Array = np.ndarray[Any, Any]
Column = TypeVar("Column")  # an array, a tensor, or a list


class DecodeRows(NamedTuple, Generic[Column]):
    """The columns of a decode step, int32 `[N]` each: N sequences with one new token each.

    The host's index, the inputs of a CUDA graph and `DecodeBatch` all take the columns from here,
    in this order.

    append_unit, append_offset: the new token's exact page (its unit; negative: the token is not
        stored) and its place in that page.
    table_row: the sequence's row of the group's tables.
    exact, blocks: numbers of exact tokens (the new one included) and of page table entries to read.
    first_exact, first_visible: the first token that the query sees, as a count of tokens in its
        sequence's exact pages, and as a position; 0 without a window.
    """

    append_unit: Column
    append_offset: Column
    table_row: Column
    exact: Column
    blocks: Column
    first_exact: Column
    first_visible: Column


class DecodeTable:
    """The `DecodeRows` of a group's table rows as a step found them, and how they go on.

    A row holds until its tables are written, or its token is past `until`.

    Args:
        exact_table, page_table: the group's tables.
        window: tokens that a query sees, its own included; None: all.
    """

    def __init__(self, exact_table: BlockTable, page_table: BlockTable, window: int | None) -> None:
        self._exact_table = exact_table
        # one array, so that whichever table is written, the row is not fresh
        self._is_fresh = page_table.is_fresh = exact_table.is_fresh
        self._window = window
        num_rows, num_columns = len(self._is_fresh), len(DecodeRows._fields)
        self._values = np.zeros((num_columns, num_rows), np.int64)
        self._moves = np.zeros((num_columns, num_rows), np.int64)  # from token to token
        # the position of the token of `_values`, the first one that it does not serve, and pages
        self._bounds = np.zeros((3, num_rows), np.int64)

    def at(
        self, rows: Array, positions: Array, slots: Callable[[int], SequenceSlots]
    ) -> tuple[Array, int]:
        """`DecodeRows` of `rows`, `[7, N]`, and the number of pages that they read together.

        Args:
            rows, positions: int64 `[N]`, each sequence's row, and the position of its new token.
            slots: the slots of the i-th sequence.
        """
        since, until, num_pages = self._bounds[:, rows]
        stale = (positions >= until) | ~self._is_fresh[rows]
        if stale.any():
            for place in stale.nonzero()[0].tolist():
                self._note(slots(place), int(positions[place]))
            since, _, num_pages = self._bounds[:, rows]
        found = self._values[:, rows] + self._moves[:, rows] * (positions - since)
        return found, int(num_pages.sum())

    def forget(self, rows: Array) -> None:
        """Keep nothing of `rows`, whose next token may be before the one that was asked for."""
        self._is_fresh[rows] = False

    def _note(self, slots: SequenceSlots, position: int) -> None:
        row, first = slots.row, position - slots.tail_start  # its place among the exact tokens
        page, offset = divmod(first, EXACT_PAGE_TOKENS)
        until = position + EXACT_PAGE_TOKENS - offset
        visible = hidden = slides = hides = 0
        if self._window is not None:
            visible = max(0, position + 1 - self._window)
            hidden = slots.exact_before(visible)
            slides = int(position + 1 >= self._window)
            if slides:
                hides = slots.exact_before(visible + 1) - hidden
                until = min(until, position + EXACT_PAGE_TOKENS - visible % EXACT_PAGE_TOKENS)
            else:
                until = min(until, self._window - 1)
        unit = self._exact_table.unit(row, page)
        self._values[:, row] = DecodeRows(
            unit, offset, row, first + 1, slots.num_sealed, hidden, visible
        )
        self._moves[:, row] = DecodeRows(0, 1, 0, 1, 0, hides, slides)
        self._bounds[:, row] = position, until, slots.num_sealed_pages
        self._is_fresh[row] = True
