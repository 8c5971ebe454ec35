"""Pages that sequences of a decode step begin with together are read by tiles of their queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.kernels.decode.plan import DecodePlan

TILE_QUERIES = 16  # query rows of a KV head that one tile has at most


def seats_per_tile(group: int) -> int:
    """Return how many sequences of `group` query heads a KV head one tile takes.

    Fewer than 2 means that sequences of such a model share no reads.
    """
    return TILE_QUERIES // group


def check_no_window(first_visible: Tensor | None) -> None:
    """Refuse shared pages under a sliding window.

    Raises:
        ValueError: there is a window.
    """
    if first_visible is not None:
        raise ValueError(
            "pages are shared under a sliding window, where every query sees other tokens of them: "
            "leave shared or first_visible out"
        )


@dataclass(frozen=True, slots=True)
class SharedPages:
    """The first pages of sequences that begin alike, each read once by a tile of sequences.

    A tile is a sequence to the kernels. Its query group has the query heads of all its members, so
    that a page is unpacked once for all of them. Members read the entries from `starts` on as
    before, and the results are merged by their log-sum-exp. Shapes depend on N alone, so that a
    captured graph serves every set of tiles.

    ```
    sequence    0   1   2   3   4   5          3 seats a tile
    seats       1   0   2   4   3   5          0: it reads all its pages alone
    starts      7   0   7   2   7   2
    members     [0, 2, 4]   [3, 5, 0]  ...     an empty seat names sequence 0
    counts      7           2          0
    ```

    Attributes:
        seats: int32 `[N]`, 1 + the place of a sequence among the seats of all tiles.
        starts: int32 `[N]`, leading table entries that a sequence's tile reads for it.
        members: int64 `[T, 1, M]`, the sequences of each tile; T is half of N.
        heads: int64 `[1, H, 1]`, the numbers of KV heads.
        counts: int32 `[T]`, entries that a tile reads; 0: it has no members.
        table: int32 `[T, max_pages]`, the rows of the first members.
        plan: the items into which a GPU cuts the work of tiles; None lets the op cut it.
    """

    seats: Tensor
    starts: Tensor
    members: Tensor
    heads: Tensor
    counts: Tensor
    table: Tensor
    plan: DecodePlan | None = None

    @classmethod
    def of(
        cls,
        seats: Tensor,
        starts: Tensor,
        table: Tensor,
        *,
        num_kv_heads: int,
        seats_per_tile: int,
    ) -> SharedPages:
        """The tiles of `seats` and `starts` int32 `[N]`, made without reading a value from them.

        Args:
            table: int `[N, max_pages]`, the page table of the sequences.
        """
        num_seqs, device = len(seats), seats.device
        num_tiles = num_seqs // 2  # a tile has at least two members
        # sequences without a seat write to place 0, which nobody reads
        sitting = torch.zeros(1 + num_tiles * seats_per_tile, dtype=torch.int64, device=device)
        counts = sitting.to(torch.int32)
        places = seats.long()
        sitting.scatter_(0, places, torch.arange(num_seqs, device=device))
        counts.scatter_(0, places, starts.to(torch.int32))
        members = sitting[1:].view(num_tiles, 1, seats_per_tile)
        return cls(
            seats,
            starts,
            members,
            torch.arange(num_kv_heads, device=device).view(1, -1, 1),
            counts[1:].view(num_tiles, seats_per_tile)[:, 0].contiguous(),
            table[members[:, 0, 0]],
        )

    @property
    def seats_per_tile(self) -> int:
        return self.members.shape[2]

    def queries(self, q: Tensor) -> Tensor:
        """The queries of tiles `[T, H M G, D]` in those of sequences, `[N, H G, D]`."""
        by_head = q.unflatten(1, (self.heads.shape[1], -1))
        return by_head[self.members, self.heads].flatten(1, 3)

    def by_sequence(self, x: Tensor, empty: float) -> Tensor:
        """What `x` `[T, H M G, ...]` says of each sequence, `[N, H G, ...]`; `empty` without a
        seat."""
        heads, seats = self.heads.shape[1], self.seats_per_tile
        if not len(x):
            group = x.shape[1] // (heads * seats)
            return x.new_full((len(self.seats), heads * group, *x.shape[2:]), empty)
        by_seat = x.unflatten(1, (heads, seats, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        found = by_seat[(self.seats.long() - 1).clamp_min(0)]
        seated = (self.seats > 0).view(-1, *[1] * (found.dim() - 1))
        return torch.where(seated, found, torch.full_like(found, empty))
