"""Positions of every sequence's slots, row by row, with a mirror on the device."""

from __future__ import annotations

import torch

from spectral_paged.device import upload


class BlockTable:
    """int32 `[num_rows, width]` of positions; entries past a sequence's end hold the trash slot.

    The host copy is written freely; `commit` sends only the rows that changed. On the CPU both
    are one tensor.
    """

    def __init__(
        self, num_rows: int, width: int, trash_position: int, device: torch.device
    ) -> None:
        self.trash_position = trash_position
        self.host = torch.full((num_rows, width), trash_position, dtype=torch.int32)
        self.device = self.host if device.type == "cpu" else self.host.to(device)
        self._changed: set[int] = set()

    @property
    def width(self) -> int:
        return self.host.shape[1]

    def write(self, row: int, start: int, positions: list[int]) -> None:
        """Set entries `start, start + 1, ...` of a row; the rest of the row is cleared."""
        end = start + len(positions)
        if positions:
            self.host[row, start:end] = torch.tensor(positions, dtype=torch.int32)
        self.host[row, end:] = self.trash_position
        self._changed.add(row)

    def commit(self) -> int:
        """Copy changed rows to the device; returns how many."""
        rows = sorted(self._changed)
        self._changed.clear()
        if rows and self.device is not self.host:
            where = self.device.device
            index = upload(rows, torch.long, where)
            self.device[index] = upload(self.host[rows], torch.int32, where)
        return len(rows)
