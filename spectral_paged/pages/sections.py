"""The sections of a page and their byte offsets.

```
page           | head 0 | head 1 | ...                                  page_bytes, multiple of 128
head record    | K side | V side | outlier tokens, uint16 [slots] | pad   multiple of 128
side           | band 0 | band 1 | ... | scale | gain | mean | slots |  every section on 16 bytes
band           | codes | third bits (3-bit bands) | basis rows (page basis) |
codes          K [512 tokens, count]   V [4 tiles, count, 128 tokens]

bytes          codes 8 bit: 512 count       4 bit: 512 count / 2     2 bit: 512 count / 4
               codes 3 bit: 512 count / 4 and 512 count / 8
               basis 8 bit: count D         4 bit: count D / 2
               scale 2 rank (512 / scale_tokens), bf16   gain 512
               mean 2 D, fp16   slots 2 D each, fp16
```

A band's codes are one plane over all 512 tokens, so that a tile of 128 tokens is one run of whole
16-byte words at every band width (decision 0013).
"""

from __future__ import annotations

from dataclasses import dataclass

from spectral_paged.kernels.page.layout import (
    BLOCK_TOKENS,
    UNIT_BYTES,
    BandLayout,
    PageLayout,
    SideLayout,
)

Bands = tuple[tuple[int, int], ...]
SECTION_BYTES = 16


@dataclass(slots=True)
class _Cursor:
    """A cursor over a record that places sections, each aligned to `SECTION_BYTES`."""

    at: int = 0

    def take(self, num_bytes: int) -> int:
        start = self.at
        self.at = -(-(start + num_bytes) // SECTION_BYTES) * SECTION_BYTES
        return start


def page_layout(
    *,
    num_kv_heads: int,
    head_dim: int,
    k_bands: Bands,
    v_bands: Bands,
    page_basis: bool,
    low_basis_bits: int,
    mean: bool,
    gain: bool,
    scale_groups: int,
    num_slots: int,
    rope: str,
    levels: str,
) -> PageLayout:
    """The byte offsets of a page of `num_kv_heads` heads of width `head_dim`.

    Args:
        k_bands, v_bands: `((count, bits), ...)`.
        page_basis: False where the basis is shared.
        low_basis_bits: 4 to store the basis rows of bands of 4 bits and less in INT4.
        scale_groups: number of scales a component.
        num_slots: number of outlier tokens a head.
    """
    cursor = _Cursor()

    def band(first: int, count: int, bits: int) -> BandLayout:
        plane_bits = 2 if bits == 3 else bits
        basis_bits = 8 if bits == 8 else low_basis_bits
        return BandLayout(
            first=first,
            count=count,
            bits=bits,
            offset=cursor.take(BLOCK_TOKENS * count * plane_bits // 8),
            high_offset=cursor.take(BLOCK_TOKENS * count // 8) if bits == 3 else -1,
            basis_offset=cursor.take(count * head_dim * basis_bits // 8) if page_basis else -1,
            basis_bits=basis_bits,
        )

    def side(bands: Bands, by_component: bool) -> SideLayout:
        laid, rank = [], 0
        for count, bits in bands:
            laid.append(band(rank, count, bits))
            rank += count
        return SideLayout(
            rank=rank,
            bands=tuple(laid),
            scale_offset=cursor.take(2 * scale_groups * rank),
            scale_groups=scale_groups,
            gain_offset=cursor.take(BLOCK_TOKENS) if gain else -1,
            mean_offset=cursor.take(2 * head_dim) if mean else -1,
            slot_offset=cursor.take(2 * head_dim * num_slots) if num_slots else -1,
            by_component=by_component,
        )

    k, v = side(k_bands, False), side(v_bands, True)
    index = cursor.take(2 * num_slots)
    head_bytes = -(-cursor.at // UNIT_BYTES) * UNIT_BYTES
    return PageLayout(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_bytes=head_bytes,
        page_bytes=head_bytes * num_kv_heads,
        rope=rope,
        levels=levels,
        num_slots=num_slots,
        index_offset=index,
        k=k,
        v=v,
    )
