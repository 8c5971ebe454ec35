"""Causal attention of prompt chunks to their history and their own tokens, in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_paged.kernels.math.scores import capped, with_sinks

QUERY_TILE = 256
# Rows between the keys of one chunk and of the next. Some kernels load whole tiles and read past
# a chunk's end: keys there are masked, but a value there times a weight of zero is NaN if the
# value is. The widest tile has 176 rows.
KEY_GAP = 192


@dataclass(frozen=True, slots=True)
class ChunkSpans:
    """The place of each chunk's queries and keys in a flattened batch.

    ```
    queries   |  chunk 0  |chunk 1|                        q_ends (0, 12, 20)
    keys      |  history 0 . chunk 0  | gap |  chunk 1  |  k_ends (0, 24, 32)
    ```

    q_ends, k_ends: running sums of lengths, from 0, without gaps.
    gap: rows between the keys of two chunks. Values there must be finite.
    max_q, max_k: the largest lengths.
    cu_q, cu_k: running sums, int32 on the device, where a gap is a chunk without queries.
    """

    q_ends: tuple[int, ...]
    k_ends: tuple[int, ...]
    gap: int
    max_q: int
    max_k: int
    cu_q: Tensor
    cu_k: Tensor

    @classmethod
    def of(
        cls, queries: Sequence[int], keys: Sequence[int], device: torch.device, *, gap: int = 0
    ) -> ChunkSpans:
        """The spans of chunks with as many queries and keys.

        Raises:
            ValueError: a chunk has more queries than keys.
        """
        if any(q > k for q, k in zip(queries, keys, strict=True)):
            raise ValueError(f"chunks of {list(queries)} queries have {list(keys)} keys")
        ends = [tuple(accumulate(lengths, initial=0)) for lengths in (queries, keys)]
        cu = [
            tuple(accumulate(with_gaps(lengths, width), initial=0)) if gap else sums
            for lengths, width, sums in zip((queries, keys), (0, gap), ends, strict=True)
        ]
        both = torch.tensor(cu, dtype=torch.int32, pin_memory=device.type == "cuda")
        sums = both.to(device, non_blocking=True)
        most = max(queries, default=0), max(keys, default=0)
        return cls(ends[0], ends[1], gap, *most, sums[0], sums[1])

    @property
    def q_lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.q_ends)]

    @property
    def k_lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.k_ends)]

    @property
    def num_key_rows(self) -> int:
        """The number of rows of keys, gaps included."""
        return self.k_ends[-1] + self.gap * max(0, len(self.k_ends) - 2)

    @property
    def gap_starts(self) -> list[int]:
        """The first row of each gap."""
        ends = self.k_ends[1:-1] if self.gap else ()
        return [end + place * self.gap for place, end in enumerate(ends)]

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of each chunk."""
        spans = zip(pairwise(self.q_ends), pairwise(self.k_ends), strict=True)
        for place, (q, (first, last)) in enumerate(spans):
            moved = place * self.gap
            yield slice(*q), slice(first + moved, last + moved)


def with_gaps(lengths: Sequence[int], gap: int) -> list[int]:
    """`lengths` with `gap` between each two."""
    return [x for length in lengths for x in (gap, length)][1:]


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: ChunkSpans,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each chunk, aligned at the bottom right: its last query sees every key.

    Args:
        q: `[T, Hq, D]` after RoPE, chunks behind each other.
        k, v: `[Hkv, L, D]`, history and own tokens of chunks behind each other, or with the gaps
            of `spans` between them; the last of a chunk's keys are its own tokens.
        softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
        window: tokens that a query sees, its own among them; the keys must then be those of
            consecutive positions. None sees all before it.
        sinks: `[Hq]`, a score of each head that adds to the sum of weights and has no value
            (gpt-oss); None: there are none.

    Returns:
        `[T, Hq, D]`, fp32.
    """
    out = q.new_empty(q.shape, dtype=torch.float32)
    for queries, keys in spans:
        _attend(q[queries], k[:, keys], v[:, keys], scale, softcap, window, sinks, out[queries])
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attend to one chunk, and write the result into `out`.

    The heads of a query group are extra query rows, so that K and V are never expanded. Queries go
    in tiles, so that the mask stays small.
    """
    num_tokens, num_q_heads, dim = q.shape
    num_kv_heads, length, _ = k.shape
    group = num_q_heads // num_kv_heads
    keys, values = k.float().unsqueeze(0), v.float().unsqueeze(0)
    for start in range(0, num_tokens, QUERY_TILE):
        end = min(start + QUERY_TILE, num_tokens)
        seen = length - num_tokens + end
        tile = q[start:end].float().view(end - start, num_kv_heads, group, dim)
        rows = tile.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * (end - start), dim)
        own = seen - (end - start)  # the key of the tile's first query
        first = 0 if window is None else max(0, own - window + 1)
        columns = torch.arange(first, seen, device=q.device)
        limit = torch.arange(own, seen, device=q.device).unsqueeze(-1)
        mask = columns <= limit
        if window is not None:
            mask &= columns > limit - window
        mask = mask.repeat(group, 1)
        k_tile, v_tile = keys[:, :, first:seen], values[:, :, first:seen]
        if softcap is None and sinks is None:
            result = F.scaled_dot_product_attention(
                rows, k_tile, v_tile, attn_mask=mask, scale=scale
            )
        else:  # SDPA has no cap, and no log-sum-exp
            scores = capped(rows @ k_tile.transpose(-1, -2) * scale, softcap)
            scores = scores.masked_fill(~mask, float("-inf"))
            result = scores.softmax(dim=-1) @ v_tile
        result = result.view(num_kv_heads, group, end - start, dim)
        result = result.permute(2, 0, 1, 3).reshape(end - start, num_q_heads, dim)
        if sinks is not None:
            lse = scores.logsumexp(dim=-1).view(num_kv_heads, group, end - start)
            lse = lse.permute(2, 0, 1).reshape(end - start, num_q_heads)
            result = with_sinks(result, lse, sinks)
        out[start:end] = result
