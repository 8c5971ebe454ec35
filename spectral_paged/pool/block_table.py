"""A block table lists the units of every sequence's slots, with a mirror on the device."""

from __future__ import annotations

import numpy as np
import torch

from spectral_paged.device import upload


class BlockTable:
    """A table int32 `[num_rows, width]` of `Arena.unit`s, one row a sequence.

    Entries past a sequence's end name the trash slot. `write` changes the host copy, and `commit`
    sends the changed rows to the device; on the CPU both copies are one tensor.

    Attributes:
        is_fresh: bool `[num_rows]`, made False of every row that is written, for others to set.
        num_writes: grows with every write.
    """

    def __init__(self, num_rows: int, width: int, trash_unit: int, device: torch.device) -> None:
        self.trash_unit = trash_unit
        self.host = torch.full((num_rows, width), trash_unit, dtype=torch.int32)
        self.device = self.host if device.type == "cpu" else self.host.to(device)
        self.is_fresh = np.zeros(num_rows, np.bool_)
        self.num_writes = 0
        self._changed: set[int] = set()
        self._array = self.host.numpy()  # the same memory

    @property
    def width(self) -> int:
        return self.host.shape[1]

    def unit(self, row: int, place: int) -> int:
        """The entry at `place` of a row."""
        return int(self._array[row, place])

    def write(self, row: int, start: int, units: list[int]) -> None:
        """Set entries `start, start + 1, ...` of a row; the rest of the row is cleared."""
        line, end = self._array[row], start + len(units)
        line[start:end] = units
        line[end:] = self.trash_unit
        self.is_fresh[row] = False
        self.num_writes += 1
        self._changed.add(row)

    def commit(self) -> None:
        """Copy changed rows to the device."""
        if not self._changed:
            return
        if self.device is not self.host:
            rows, where = sorted(self._changed), self.device.device
            index = upload(rows, torch.long, where)
            self.device[index] = upload(self._array[rows], torch.int32, where)
        self._changed.clear()
