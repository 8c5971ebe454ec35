"""Integers that tell a kernel where the bytes of a page are. Filled in by `PageFormat.layout`."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 512
EXACT_PAGE_TOKENS = 64
UNIT_BYTES = 128
COEFF_OFFSET = 128


@dataclass(frozen=True, slots=True)
class SideLayout:
    """One side (K or V) of one head inside a page; byte offsets count from the head's start.

    ```
    coeff_offset   uint8 [512, rank]       value + 128
    basis_offset   uint8 [rank, head_dim]  value + 128
    scale_offset   fp32  [rank]            coefficient scale x basis row scale
    mean_offset    fp16  [head_dim]        only with mean_offset >= 0
    ```
    """

    rank: int
    coeff_offset: int
    basis_offset: int
    scale_offset: int
    mean_offset: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """A page is `num_kv_heads` head records of `head_bytes` each; a record is `k` then `v`."""

    num_kv_heads: int
    head_dim: int
    head_bytes: int
    page_bytes: int
    rotate_keys: bool
    k: SideLayout
    v: SideLayout


def exact_page_bytes(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one exact page `[num_kv_heads, 2 (K|V), 64, head_dim]` of `itemsize`-byte values."""
    return num_kv_heads * 2 * EXACT_PAGE_TOKENS * head_dim * itemsize
