"""One step's plan, what came of it, and the index tensors that a group's kernels need for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectral_paged.errors import NonFiniteError
from spectral_paged.kernels.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.kernels.page_ops import PageOps
from spectral_paged.layer_group import LayerGroup
from spectral_paged.page_format import PageFormat


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """`num_new` tokens of one sequence, the first of them at position `start`."""

    seq_id: str
    start: int
    num_new: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, in the order in which q, k and v are flattened."""

    entries: tuple[PlanEntry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(e.num_new for e in self.entries)


@dataclass(slots=True)
class StepReport:
    """What `end_step` did. Sequences in `failed` hold NaN or Inf; free them."""

    blocks_sealed: int = 0
    failed: dict[str, NonFiniteError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with more than one new token: a span of the flat batch and where its K, V are."""

    flat_start: int
    num_new: int
    row: int
    num_exact: int  # exact tokens, the new ones among them
    num_blocks: int  # page table entries to visit, holes of pinned blocks among them
    num_pages: int


@dataclass(frozen=True, slots=True)
class GroupStep:
    """Index tensors of a step for one group; T new tokens, N sequences with exactly one."""

    append_positions: Tensor  # int [T], exact page of each new token, 128-byte units
    append_offsets: Tensor  # int [T], its place in that page
    decode_tokens: Tensor  # int64 [N], places in the flat batch
    decode_rows: Tensor  # int64 [N], table rows
    decode_exact: Tensor  # int32 [N], exact tokens, the new one among them
    decode_blocks: Tensor  # int32 [N], page table entries to visit, holes among them
    num_decode_pages: int
    chunks: tuple[Chunk, ...]
    exact_plan: dict[str, Any]  # what `exact_decode` and `spectral_decode` of all layers share
    page_plan: dict[str, Any]

    @classmethod
    def of(
        cls, group: LayerGroup, plan: StepPlan, format: PageFormat, ops: PageOps
    ) -> GroupStep:
        """Look up where the plan's tokens go in the group's tables."""
        device = group.exact_table.device.device
        positions, offsets = [], []
        tokens, rows, exact, blocks = [], [], [], []
        num_decode_pages = 0
        chunks = []
        flat = 0
        for entry in plan.entries:
            slots = group.sequences[entry.seq_id]
            num_pages = slots.num_sealed_pages
            first = entry.start - num_pages * BLOCK_TOKENS
            place = torch.arange(first, first + entry.num_new)
            positions.append(group.exact_table.host[slots.row][place // EXACT_PAGE_TOKENS])
            offsets.append(place % EXACT_PAGE_TOKENS)
            if entry.num_new == 1:
                tokens.append(flat)
                rows.append(slots.row)
                exact.append(first + 1)
                blocks.append(slots.num_sealed)
                num_decode_pages += num_pages
            else:
                num_exact = first + entry.num_new
                chunks.append(
                    Chunk(
                        flat, entry.num_new, slots.row, num_exact, slots.num_sealed, num_pages
                    )
                )
            flat += entry.num_new
        decode_exact = torch.tensor(exact, dtype=torch.int32, device=device)
        decode_blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
        exact_plan, page_plan = {}, {}
        if tokens:
            num_exact = sum(-(-count // EXACT_PAGE_TOKENS) for count in exact)
            exact_plan = ops.exact_plan(decode_exact, num_exact, format.num_kv_heads)
        if num_decode_pages:
            page_plan = ops.page_plan(format.layout, decode_blocks, sum(blocks))
        return cls(
            append_positions=torch.cat(positions).to(device),
            append_offsets=torch.cat(offsets).to(device),
            decode_tokens=torch.tensor(tokens, dtype=torch.long, device=device),
            decode_rows=torch.tensor(rows, dtype=torch.long, device=device),
            decode_exact=decode_exact,
            decode_blocks=decode_blocks,
            num_decode_pages=num_decode_pages,
            chunks=tuple(chunks),
            exact_plan=exact_plan,
            page_plan=page_plan,
        )
