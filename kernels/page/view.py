"""Typed tensor views into the bytes of pages, by their `PageLayout`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spectral_paged.kernels.page.bit_packing import pack, unpack
from spectral_paged.kernels.page.layout import (
    BLOCK_TOKENS,
    COEFF_OFFSET,
    GAIN_OFFSET,
    GAIN_STEPS,
    LEVELS,
    TILE_TOKENS,
    UNIT_BYTES,
    BandLayout,
    PageLayout,
    SideLayout,
)


@dataclass(frozen=True, slots=True)
class BandView:
    """Writable bytes of one band of `N` pages with `H` heads, and their layout.

    Rows are tokens `[512]`, or components of tiles `[4, count]` where codes lie by component.
    """

    layout: BandLayout
    by_component: bool
    plane: Tensor  # uint8 [N, H, *rows, bytes a row]
    high: Tensor | None  # uint8 [N, H, *rows, codes / 8], 3-bit bands only
    basis: Tensor | None  # uint8 [N, H, count, bytes a row], page bases only

    def codes(self) -> Tensor:
        """The codes of the band, uint8 `[N, H, 512, count]`."""
        rows = unpack(self.plane, self.high, self.layout.bits, by_component=self.by_component)
        return rows.transpose(-1, -2).flatten(-3, -2) if self.by_component else rows

    def write(self, codes: Tensor) -> None:
        """Pack uint8 codes `[N, H, 512, count]` into the page."""
        if self.by_component:
            codes = codes.unflatten(-2, (-1, TILE_TOKENS)).transpose(-1, -2)
        plane, high = pack(codes, self.layout.bits, by_component=self.by_component)
        self.plane.copy_(plane)
        if self.high is not None and high is not None:
            self.high.copy_(high)

    def values(self, levels: str) -> Tensor:
        """The levels of the codes, fp32 integers `[N, H, 512, count]`."""
        return code_values(self.codes(), self.layout.bits, levels)

    def basis_values(self) -> Tensor:
        """The basis rows that lie in the page, fp32 integers `[N, H, count, D]`, not scaled."""
        assert self.basis is not None, "the basis is shared"
        bits = self.layout.basis_bits
        return code_values(unpack(self.basis, None, bits), bits, "gaussian")


@dataclass(frozen=True, slots=True)
class SideView:
    """Writable views of one side of `N` pages with `H` heads; they share the pages' memory."""

    layout: SideLayout
    levels: str
    bands: tuple[BandView, ...]
    scale: Tensor  # bf16 [N, H, groups, rank]
    gain: Tensor | None  # uint8 [N, H, 512]
    mean: Tensor | None  # fp16  [N, H, D]
    slots: Tensor | None  # fp16  [N, H, slots, D]

    def coefficients(self) -> Tensor:
        """The coefficients, fp32 `[N, H, 512, rank]`: levels times scales and gains."""
        integers = torch.cat([band.values(self.levels) for band in self.bands], dim=-1)
        groups = integers.unflatten(-2, (self.layout.scale_groups, -1))
        scaled = (groups * self.scale.float().unsqueeze(-2)).flatten(-3, -2)
        if self.gain is None:
            return scaled
        return scaled * gain_values(self.gain).unsqueeze(-1)

    def basis(self, shared: Tensor | None) -> Tensor:
        """The basis rows, fp32 `[N or 1, H, rank, D]`: the page's own integers, or `shared`."""
        if self.layout.shared_basis:
            assert shared is not None, "this format's basis is not in the page"
            return shared if shared.dim() == 4 else shared.unsqueeze(0)
        return torch.cat([band.basis_values() for band in self.bands], dim=-2)


@cache
def _level_table(bits: int, levels: str, device: torch.device) -> Tensor:
    return torch.tensor(LEVELS[levels][bits], dtype=torch.float32, device=device)


def code_values(codes: Tensor, bits: int, levels: str) -> Tensor:
    """The levels, fp32 integers, of uint8 `codes` of `bits` bits."""
    if bits == 8:
        return codes.float() - COEFF_OFFSET
    table = _level_table(bits, levels, codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def gain_values(codes: Tensor) -> Tensor:
    """The gains of uint8 gain codes, fp32."""
    return torch.exp2((codes.float() - GAIN_OFFSET) / GAIN_STEPS)


def side_view(pages: Tensor, layout: PageLayout, side: str) -> SideView:
    """Views of the K (`side="k"`) or V sections of `pages`, uint8 `[N, page_bytes]`."""
    part = layout.k if side == "k" else layout.v
    heads = pages.view(-1, layout.num_kv_heads, layout.head_bytes)
    dim = layout.head_dim

    def section(offset: int, rows: int, row_bytes: int) -> Tensor:
        return heads[..., offset : offset + rows * row_bytes].unflatten(-1, (rows, row_bytes))

    def halves(offset: int, rows: int) -> Tensor | None:
        return None if offset < 0 else section(offset, rows, 2 * dim).view(torch.float16)

    def codes(offset: int, band: BandLayout, bits: int) -> Tensor:
        if not part.by_component:
            return section(offset, BLOCK_TOKENS, band.count * bits // 8)
        tiles = BLOCK_TOKENS // TILE_TOKENS
        rows = section(offset, tiles * band.count, TILE_TOKENS * bits // 8)
        return rows.unflatten(-2, (tiles, band.count))

    bands = []
    for band in part.bands:
        bands.append(
            BandView(
                band,
                part.by_component,
                plane=codes(band.offset, band, 2 if band.bits == 3 else band.bits),
                high=codes(band.high_offset, band, 1) if band.bits == 3 else None,
                basis=None
                if part.shared_basis
                else section(band.basis_offset, band.count, dim * band.basis_bits // 8),
            )
        )
    mean = halves(part.mean_offset, 1)
    gain = None
    if part.gain_offset >= 0:
        gain = section(part.gain_offset, 1, BLOCK_TOKENS)[..., 0, :]
    return SideView(
        layout=part,
        levels=layout.levels,
        bands=tuple(bands),
        scale=section(part.scale_offset, part.scale_groups, 2 * part.rank).view(torch.bfloat16),
        gain=gain,
        mean=None if mean is None else mean[..., 0, :],
        slots=halves(part.slot_offset, layout.num_slots),
    )


def slot_tokens(pages: Tensor, layout: PageLayout) -> Tensor:
    """A writable view of the outlier tokens of `pages`, int16 `[N, H, slots]` of 0 to 511."""
    heads = pages.view(-1, layout.num_kv_heads, layout.head_bytes)
    start = layout.index_offset
    return heads[..., start : start + 2 * layout.num_slots].view(torch.int16)


def put_slots(x: Tensor, pages: Tensor, layout: PageLayout, slots: Tensor) -> Tensor:
    """`x` `[N, H, 512, D]` with its outlier tokens replaced by `slots` `[N, H, slots, D]`."""
    index = slot_tokens(pages, layout).long().unsqueeze(-1).expand(slots.shape)
    return x.scatter(-2, index, slots.to(x.dtype))


def rebuild_side(
    pages: Tensor, layout: PageLayout, side: str, shared: Tensor | None = None
) -> Tensor:
    """K or V of whole pages, mean + C B, fp32 `[N, H, 512, D]`; keys in the form of `layout.rope`.

    `shared`: the layer's basis `[H, rank, D]` (or one a page, `[N, H, rank, D]`) where the format
    has it outside the page.
    """
    view = side_view(pages, layout, side)
    rebuilt = view.coefficients() @ view.basis(shared)
    if view.mean is not None:
        rebuilt = rebuilt + view.mean.float().unsqueeze(-2)
    return rebuilt if view.slots is None else put_slots(rebuilt, pages, layout, view.slots)


def gather_units(plane: Tensor, first: Tensor, num_bytes: int) -> Tensor:
    """Copy `num_bytes` from each unit of `first` on of a uint8 plane: `[N, num_bytes]`."""
    units = torch.arange(num_bytes // UNIT_BYTES, device=plane.device)
    rows = plane.view(-1, UNIT_BYTES)[first.long().unsqueeze(-1) + units]
    return rows.view(first.shape[0], num_bytes)


def put_units(planes: Tensor, first: Tensor, rows: Tensor) -> None:
    """Store `rows` uint8 `[L, N, num_bytes]` from each unit of `first` on, in L uint8 planes."""
    units = torch.arange(rows.shape[-1] // UNIT_BYTES, device=planes.device)
    places = first.long().unsqueeze(-1) + units
    planes.view(len(planes), -1, UNIT_BYTES)[:, places] = rows.unflatten(-1, (-1, UNIT_BYTES))
