"""Inputs of `bench decode`: random exact pages and random pages of a format, on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_paged.kernels.decode import batch
from spectral_paged.kernels.decode.batch import Basis
from spectral_paged.kernels.decode.gpu import plan_pages, planned_pages
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.decode.triton.exact import plan_exact
from spectral_paged.kernels.launch.configs import DecodeConfig
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.page.layout import (
    BLOCK_TOKENS,
    EXACT_PAGE_TOKENS,
    UNIT_BYTES,
    exact_page_bytes,
)
from spectral_paged.kernels.page.view import side_view, slot_tokens
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable

LANDMARKS = 64


def random_pages(format: PageFormat, count: int) -> Tensor:
    """A plane of `count` pages with random codes and plausible scales."""
    plane = torch.randint(256, (count * format.page_bytes,), dtype=torch.uint8, device="cuda")
    pages = plane.view(count, -1)
    for side in "kv":
        view = side_view(pages, format.layout, side)
        view.scale.fill_(2e-3)
        for part, value in ((view.mean, 0.1), (view.slots, 0.5), (view.gain, 128)):
            if part is not None:
                part.fill_(value)
    if format.outlier_slots:
        slots = torch.arange(format.outlier_slots, device="cuda") * 100
        slot_tokens(pages, format.layout).copy_(slots)
    return plane


def shuffled_table(lengths: Sequence[int], page_tokens: int, page_size: int) -> Tensor:
    """A block table, int32 `[N, most pages]`, with all pages at random units of one plane."""
    counts = [-(-n // page_tokens) for n in lengths]
    order = torch.randperm(sum(counts), device="cuda").to(torch.int32) * (page_size // UNIT_BYTES)
    table = torch.zeros(len(counts), max(*counts, 1), dtype=torch.int32, device="cuda")
    at = 0
    for i, count in enumerate(counts):
        table[i, :count] = order[at : at + count]
        at += count
    return table


@dataclass(frozen=True, slots=True)
class ExactPages:
    """Random exact pages at random units of `plane`; `num_bytes` are those of their tokens."""

    plane: Tensor
    table: Tensor
    tokens: Tensor
    plan: DecodePlan
    num_bytes: int

    @classmethod
    def random(cls, lengths: Sequence[int], heads: int, dim: int) -> ExactPages:
        """Exact pages of sequences of `lengths` tokens, bf16."""
        size = exact_page_bytes(heads, dim, 2)
        pages = max(sum(-(-n // EXACT_PAGE_TOKENS) for n in lengths), 1)
        tokens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        return cls(
            torch.randn(pages * size // 2, dtype=torch.bfloat16, device="cuda").view(torch.uint8),
            shuffled_table(lengths, EXACT_PAGE_TOKENS, size),
            tokens,
            plan_exact(tokens, pages, heads),
            sum(lengths) * heads * dim * 4,
        )


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of random codes at random units of `plane`, and the arguments of ops over them."""

    format: PageFormat
    plane: Tensor
    table: Tensor
    counts: Tensor
    rows: dict[str, Tensor]  # bases that all pages share
    rope: RotaryTable
    num_pages: int

    @classmethod
    def random(cls, format: PageFormat, lengths: Sequence[int], rope: RotaryTable) -> Pages:
        """Pages of sequences of `lengths` tokens; tokens that do not fill a page are left out."""
        counts = [n // BLOCK_TOKENS for n in lengths]
        rows = {}
        if format.basis == "shared":
            for name, rank in (("k_basis", format.k_rank), ("v_basis", format.v_rank)):
                basis = torch.randn(format.num_kv_heads, rank, format.head_dim, device="cuda")
                rows[name] = 0.1 * basis.half()
        return cls(
            format,
            random_pages(format, max(sum(counts), 1)),
            shuffled_table([n * BLOCK_TOKENS for n in counts], BLOCK_TOKENS, format.page_bytes),
            torch.tensor(counts, dtype=torch.int32, device="cuda"),
            rows,
            rope,
            sum(counts),
        )

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.format.page_bytes

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `spectral_decode` for these pages: layout, positions, rotation and rows."""
        return {
            "layout": self.format.layout,
            "first_position": LANDMARKS,
            "cos": self.rope.cos,
            "sin": self.rope.sin,
            **self.rows,
        }

    def plan(self, config: DecodeConfig | None = None) -> DecodePlan:
        """The work items of a step for kernels launched by `config`."""
        return plan_pages(self.format.layout, self.counts, max(self.num_pages, 1), config)

    @property
    def basis(self) -> Basis:
        """The rows that all pages share, for ops that attend to all tiers."""
        return Basis(self.rows.get("k_basis"), self.rows.get("v_basis"))

    def planned(self, config: DecodeConfig | None = None) -> batch.Pages:
        """The pages for ops that attend to all tiers, launched by `config`."""
        rotation = Rotation(self.rope.cos, self.rope.sin, LANDMARKS)
        pages = batch.Pages(self.table, self.counts, self.format.layout, rotation, config=config)
        return planned_pages(pages, max(self.num_pages, 1))
