"""The work of decode attention in a step, cut into items of about equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Items of decode attention, each a run of consecutive table entries of one sequence.

    Items are cut by work: a long sequence has many, a short one has one, and no item is longer than
    a common limit. The items of a sequence differ by one entry at most. All tensors are computed on
    the device, so that a captured graph replays them for other lengths. Only the length of
    `item_seq` is fixed.

    ```
    sequence     0            1      2 (empty)   3
    entries      10           3      0           8         at most 4 an item
    items        0 1 2        3      -           4 5       first_item [0, 3, 4, 4, 6]
    start        0 3 6        0                  0 4
    end          3 6 10       3                  4 8
    ```

    Attributes:
        item_seq: int32 `[num_items]`, the sequence of each item; N for an item without work.
        item_start, item_end: int32 `[num_items]`, the table entries of each item.
        first_item: int32 `[N + 1]`, the items of sequence i are `first_item[i] : first_item[i+1]`.
        first_entry: int32 `[N + 1]`, numbers the entries of all sequences: entry e of sequence i
            is `first_entry[i] + e`, and the last element is their number. Without `starts` it is
            the running sum of entries.
        entry_seq: int32 `[max_entries]`, the sequence of each numbered entry, N past the last; None
            where no kernel goes by entries.
        max_entries: most entries that all sequences may have together.
    """

    item_seq: Tensor
    item_start: Tensor
    item_end: Tensor
    first_item: Tensor
    first_entry: Tensor
    entry_seq: Tensor | None
    max_entries: int

    @property
    def num_items(self) -> int:
        return self.item_seq.shape[0]

    @classmethod
    def of(
        cls,
        num_entries: Tensor,
        *,
        max_entries: int,
        target_items: int,
        grain: int = 1,
        by_entry: bool = False,
        starts: Tensor | None = None,
    ) -> DecodePlan:
        """Cut `num_entries` int `[N]` table entries a sequence into about `target_items` items.

        Args:
            max_entries: a bound on their sum, known on the host.
            grain: entries of an item, if that leaves at least half of `target_items` items.
            by_entry: compute `entry_seq`, too.
            starts: int `[N]`, the first of each sequence's entries; None: 0.
        """
        counts = num_entries.to(torch.int32)
        num_seqs = counts.shape[0]
        zero = counts.new_zeros(1)
        first_entry = torch.cat((zero, counts.cumsum(0, dtype=torch.int32)))
        total = first_entry[-1:]
        chunk = (total + target_items - 1).div(target_items, rounding_mode="floor")
        if grain > 1:
            half = max(1, target_items // 2)
            coarse = (total + half - 1).div(half, rounding_mode="floor").clamp_max(grain)
            chunk = torch.maximum(chunk, coarse)
        chunk = chunk.clamp_min(1)
        items = (counts + chunk - 1).div(chunk, rounding_mode="floor")
        first_item = torch.cat((zero, items.cumsum(0, dtype=torch.int32)))
        slots = min(max_entries, target_items + num_seqs)
        slot = torch.arange(max(slots, 1), dtype=torch.int32, device=counts.device)
        seq = torch.searchsorted(first_item[1:], slot, right=True, out_int32=True)
        # the k-th of n items of a sequence takes entries [k count / n, (k + 1) count / n)
        own = torch.cat((items, zero + 1))[seq].clamp_min(1)
        count, place = torch.cat((counts, zero))[seq], slot - first_item[seq]
        start, end = (
            (k * count).div(own, rounding_mode="floor").to(torch.int32) for k in (place, place + 1)
        )
        entry_seq = None
        ends = first_entry[1:]
        if starts is not None:
            before = torch.cat((starts.to(torch.int32), zero))
            start, end = start + before[seq], end + before[seq]
            first_entry = first_entry - before
        if by_entry:
            every = torch.arange(max(max_entries, 1), dtype=torch.int32, device=counts.device)
            entry_seq = torch.searchsorted(ends, every, right=True, out_int32=True)
        return cls(
            item_seq=seq,
            item_start=start,
            item_end=end,
            first_item=first_item,
            first_entry=first_entry,
            entry_seq=entry_seq,
            max_entries=max(max_entries, 1),
        )
