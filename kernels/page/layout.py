"""Byte offsets and sizes of the parts of a page, as kernels take them.

`PageFormat.layout` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 512
TILE_TOKENS = 128  # a kernel takes so many at once; V's codes are packed along a tile's tokens
EXACT_PAGE_TOKENS = 64
UNIT_BYTES = 128
COEFF_OFFSET = 128

# A gain code g means 2 ** ((g - GAIN_OFFSET) / GAIN_STEPS): from 2 ** -8 to 2 ** 8, 4.4 % apart.
# Code 0 marks an outlier token, whose other codes mean nothing.
GAIN_SKIPPED = 0
GAIN_OFFSET = 128
GAIN_STEPS = 16

# Reconstruction levels by code, as INT8 integers. `gaussian`: the Lloyd-Max quantizer of a normal
# variable (Max 1960, table 1), rounded to integers of 1 / LEVEL_UNIT standard deviations. A GPU's
# byte permute looks up eight levels. Of the 16 levels of 4 bits, those of codes n and n + 8 have
# the same sign (bit 2), so that the XOR of two permutes looks them up: each permute gives zeros or
# ones where the other one has the level. `uniform`: evenly spaced, scaled to the largest value.
LEVELS: dict[str, dict[int, tuple[int, ...]]] = {
    "gaussian": {
        2: (-120, -36, 36, 120),
        3: (-125, -78, -44, -14, 14, 44, 78, 125),
        4: (-126, -95, -74, -58, 6, 18, 30, 43, -43, -30, -18, -6, 58, 74, 95, 126),
    },
    "uniform": {
        2: (-3, -1, 1, 3),
        3: (-7, -5, -3, -1, 1, 3, 5, 7),
        4: tuple(range(-15, 16, 2)),
    },
}
LEVEL_UNIT = {2: 79.47, 3: 58.0, 4: 46.0}


@dataclass(frozen=True, slots=True)
class BandLayout:
    """The place of the codes of `count` components from `first` on, and of their basis rows.

    K's codes lie token by token: the `n` codes of a row are the components of one token. V's codes
    lie component by component within tiles of 128 tokens: the `n` = 128 codes of a row are those of
    one component. In both, the codes that a product sums over lie in one word.

    ```
             K [512, row bytes]      V [4, count, row bytes]
    bits 8   offset       uint8 [.., n]      value + 128
    bits 4   offset       uint8 [.., n / 2]  code 2i in the low nibble of byte i
    bits 2   offset       uint8 [.., n / 4]  code 4i + j in bits 2j, 2j + 1 of byte i
    bits 3   offset       as bits 2: the low two bits of the code
             high_offset  uint8 [.., n / 8]  the third bit
                          K: code 8i + j in bit j of byte i
                          V: of 32 codes, a word: code 16a + 2i + b in bit 4i + 2a + b
    ```
    """

    first: int
    count: int
    bits: int
    offset: int
    high_offset: int
    basis_offset: int  # -1: shared basis
    basis_bits: int  # 8: uint8 [count, head_dim], value + 128; 4: uint8 [count, head_dim / 2]


@dataclass(frozen=True, slots=True)
class SideLayout:
    """The places of one side (K or V) of one head inside a page, in bytes from the head's start.

    Absent parts have offset -1.

    ```
    bands          codes of the coefficients, basis rows where the page holds them
    scale_offset   bf16  [scale_groups, rank]  one a component and 512 / scale_groups tokens
    gain_offset    uint8 [512]                 2 ** ((g - 128) / 16), one a token; 0: in a slot
    mean_offset    fp16  [head_dim]
    slot_offset    fp16  [num_slots, head_dim] exact values of the outlier tokens
    ```
    """

    rank: int
    bands: tuple[BandLayout, ...]
    scale_offset: int
    scale_groups: int
    gain_offset: int
    mean_offset: int
    slot_offset: int
    by_component: bool  # codes lie component by component (V)

    @property
    def shared_basis(self) -> bool:
        return self.bands[0].basis_offset < 0


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The layout of a page: `num_kv_heads` head records of `head_bytes` each.

    `rope` is the form in which keys are stored: `pre`, before RoPE; `frame`, turned relative to the
    middle of their frame of 128 tokens; `post`, after RoPE, as attention reads them.

    A record is `k`, `v`, then `index_offset`: uint16 `[num_slots]`, the outlier tokens of the head
    (0 to 511, ascending, no repeats), the same for K and V.
    """

    num_kv_heads: int
    head_dim: int
    head_bytes: int
    page_bytes: int
    rope: str
    levels: str
    num_slots: int
    index_offset: int
    k: SideLayout
    v: SideLayout


def exact_page_bytes(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of an exact page, `[num_kv_heads, 2 (K|V), 64, head_dim]` of `itemsize`-byte values."""
    return num_kv_heads * 2 * EXACT_PAGE_TOKENS * head_dim * itemsize
