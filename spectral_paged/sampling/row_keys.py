"""Rows of a table on the device are given to keys, and taken back."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

FEWEST_ROWS = 8


class RowKeys:
    """Knows the row of each key that holds one, and how many rows its table has.

    A table grows before a key gets a row that it does not have: `num_wanted`, then `add_rows`.
    """

    def __init__(self) -> None:
        self._rows: dict[Hashable, int] = {}
        self._free: list[int] = []
        self.num_rows = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Hashable) -> int | None:
        return self._rows.get(key)

    def first_of(self, keys: Iterable[Hashable]) -> int | None:
        """Return the row of the first of `keys` that holds one."""
        return next((self._rows[key] for key in keys if key in self._rows), None)

    @property
    def num_wanted(self) -> int:
        """The rows that the table must have for one more key."""
        return self.num_rows if self._free else max(FEWEST_ROWS, 2 * self.num_rows)

    def add_rows(self, num_rows: int) -> None:
        """Tell that the table has `num_rows` rows now."""
        self._free += range(num_rows - 1, self.num_rows - 1, -1)
        self.num_rows = num_rows

    @property
    def next_row(self) -> int:
        """The row that the next key gets."""
        return self._free[-1]

    def take(self, key: Hashable) -> int:
        """Give `next_row` to a key, once the row is whole."""
        self._rows[key] = self._free.pop()
        return self._rows[key]

    def release(self, key: Hashable) -> int | None:
        """Take back and return the row of `key`, if it holds one."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._free.append(row)
        return row
