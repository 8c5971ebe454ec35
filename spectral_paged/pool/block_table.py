"""A block table lists the units of every sequence's slots, with a mirror on the device."""

from __future__ import annotations

import torch

from spectral_paged.device import upload


class BlockTable:
    """A table int32 `[num_rows, width]` of `Arena.unit`s, one row a sequence.

    Entries past a sequence's end name the trash slot. `write` changes the host copy, and `commit`
    sends the changed rows to the device; on the CPU both copies are one tensor.
    """

    def __init__(self, num_rows: int, width: int, trash_unit: int, device: torch.device) -> None:
        self.trash_unit = trash_unit
        self.host = torch.full((num_rows, width), trash_unit, dtype=torch.int32)
        self.device = self.host if device.type == "cpu" else self.host.to(device)
        self._changed: set[int] = set()

    @property
    def width(self) -> int:
        return self.host.shape[1]

    def write(self, row: int, start: int, units: list[int]) -> None:
        """Set entries `start, start + 1, ...` of a row; the rest of the row is cleared."""
        end = start + len(units)
        if units:
            self.host[row, start:end] = torch.tensor(units, dtype=torch.int32)
        self.host[row, end:] = self.trash_unit
        self._changed.add(row)

    def commit(self) -> None:
        """Copy changed rows to the device."""
        rows = sorted(self._changed)
        self._changed.clear()
        if rows and self.device is not self.host:
            where = self.device.device
            index = upload(rows, torch.long, where)
            self.device[index] = upload(self.host[rows], torch.int32, where)
