"""The token ids of the columns that a cache stores, which say whether a prompt goes on from them.

`generate` cuts as many ids off a prompt as the cache has columns, whatever these contain. So a
prompt that is longer than an earlier one looks as if it went on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class StoredColumns:
    """The ids of all stored columns; they are not known once embeddings came in place of ids.

    Attributes:
        parts: ids of each forward, int64 `[rows, columns]`.
    """

    parts: list[Tensor] = field(default_factory=list)
    are_known: bool = True

    def add(self, token_ids: Tensor | None) -> None:
        """Add the columns of a forward; None: they were embeddings."""
        if token_ids is None:
            self.parts, self.are_known = [], False
        elif self.are_known:
            self.parts.append(token_ids)

    def take(self, sources: Sequence[int]) -> None:
        """Replace the rows by copies of rows `sources`."""
        if self.parts:
            stored = torch.cat(self.parts, dim=1)
            self.parts = [stored[torch.tensor(sources, device=stored.device)]]

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Return whether prompts begin with the stored columns, pads left out; True if not known.

        Args:
            input_ids, attention_mask: `[B, T]`; every prompt is that of `rows / B` rows.
        """
        if not self.parts:
            return True
        stored = torch.cat(self.parts, dim=1)
        width = stored.shape[1]
        if len(stored) % len(input_ids) or input_ids.shape[1] <= width:
            return False
        same = stored.unflatten(0, (len(input_ids), -1)) == input_ids[:, None, :width].to(
            stored.device
        )
        if attention_mask is not None:
            same |= ~attention_mask[:, None, :width].to(stored.device, torch.bool)
        return bool(same.all())
