"""Counts of the sequences in all rows, as arrays: most steps need not visit the sequences.

A decode step stores one token more of every sequence. For 62 of 64 tokens nothing else happens: the
token's exact page is held, no page becomes full, and queries see the pages that they saw. A row is
quiet until then.

```
position    0        1 ... 62     63            64                       65 ...
            takes    quiet        fills its     takes a slot; a block    quiet
            a slot                exact page    may be complete, or due
```
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS

Array = np.ndarray[Any, Any]


class RowCounts:
    """Counts by row of the tables.

    Attributes:
        num_tokens: int64 `[R]`, tokens whose K and V are stored.
        quiet_until: int64 `[R]`; a row with fewer tokens is quiet: its next token takes no slot,
            gives none back, publishes nothing and makes nothing due.
        has_block: int64 `[R]`, 1 if a complete block may be sealed ahead, in whichever step.
        all: these three, int64 `[3, R]`, for those who want several of some rows.
    """

    def __init__(self, num_rows: int) -> None:
        self.all = np.zeros((3, num_rows), np.int64)
        self.num_tokens, self.quiet_until, self.has_block = self.all

    def clear(self, row: int) -> None:
        """Count nothing for a row that no sequence has."""
        self.all[:, row] = 0


def next_edge(position: int, origin: int = 0) -> int:
    """The first position from `position` on whose token begins or ends a span of 64 tokens, where
    spans are counted from `origin`."""
    place = (position - origin) % EXACT_PAGE_TOKENS
    return position if place == 0 else position + EXACT_PAGE_TOKENS - 1 - place
