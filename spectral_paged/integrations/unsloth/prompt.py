"""The tokens of a padded prompt, taken chunk by chunk as one flat row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectral_paged.device import upload
from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.padded_rows import PaddedRows

MAX_CHUNK_TOKENS = 8192  # most tokens of one forward: enough to keep a GPU busy


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """The T tokens of a prompt that one forward computes.

    lengths: tokens of each row that has some, in the order of the cache's plan.
    places: int64 `[T]` on the device, the places of tokens in the flattened `[B * width]`; tokens
        whose logits are wanted come last.
    order: int64 `[T]`, the place of each token in the plan; None where it is the same.
    num_wanted: tokens whose logits are wanted.
    """

    lengths: dict[int, int]
    places: Tensor
    order: Tensor | None
    num_wanted: int


class PromptTokens:
    """The tokens of a padded prompt that are still to be computed, and the logits so far.

    Args:
        rows: the prompt's columns.
        keep: last columns whose logits are wanted; 0: all columns.

    Raises:
        InvalidRequestError: a row ends in a pad, which the next token would follow.
    """

    def __init__(self, rows: PaddedRows, keep: int) -> None:
        if rows.shown is not None and not bool(rows.shown[:, -1].all()):
            row = int((~rows.shown[:, -1]).nonzero()[0])
            raise InvalidRequestError(
                f"row {row} ends in a pad: pad on the left (tokenizer.padding_side = 'left')"
            )
        self.rows = rows
        self.first_kept = rows.width - keep if keep else 0
        everywhere = np.arange(rows.batch_size * rows.width)
        places = everywhere if rows.places is None else rows.places.cpu().numpy()
        self._left = np.split(places, np.cumsum(rows.num_new)[:-1])
        self.logits: Tensor | None = None

    def next_chunk(self, limit: Callable[[int], int]) -> PromptChunk | None:
        """Take the next tokens, of as many rows as there is room for; None when all are taken.

        Args:
            limit: by row, the most tokens of it that one step may compute now.
        """
        room, lengths, parts = MAX_CHUNK_TOKENS, {}, []
        for row, left in enumerate(self._left):
            if count := min(len(left), room) and min(len(left), room, limit(row)):
                lengths[row] = count
                parts.append(left[:count])
                self._left[row] = left[count:]
                room -= count
        if not lengths:
            return None
        places = np.concatenate(parts)
        wanted = places % self.rows.width >= self.first_kept
        order = np.argsort(wanted, kind="stable")
        device = self.rows.position_ids.device
        moved = upload(np.stack([places[order], order]), torch.long, device)
        in_order = bool((order == np.arange(len(order))).all())
        return PromptChunk(lengths, moved[0], None if in_order else moved[1], int(wanted.sum()))

    def store(self, chunk: PromptChunk, logits: Tensor) -> None:
        """Keep the logits `[num_wanted, vocab]` of a chunk in `[B, kept columns, vocab]`.

        The logits of pads are zero.
        """
        kept = self.rows.width - self.first_kept
        if self.logits is None:
            self.logits = logits.new_zeros(self.rows.batch_size, kept, logits.shape[-1])
        places = chunk.places[len(chunk.places) - chunk.num_wanted :]
        row, column = places // self.rows.width, places % self.rows.width - self.first_kept
        self.logits[row, column] = logits
