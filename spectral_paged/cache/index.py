"""Index tensors of an open step: where a group's kernels write new tokens and what they read.

```
StepPlan  ->  StepIndex (host: where tokens go, who reads what)  ->  GroupStep (the device's)
```

A step in which every sequence has one new token needs no more than a `DecodeBatch` of fixed shape,
which is what a CUDA graph replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.plan import StepPlan
from spectral_paged.cache.sequence_slots import Run
from spectral_paged.device import upload, upload_rows
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.ops import PageOps
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.pages import PageFormat

HISTORY_TOKENS = 32_768  # keys that chunks attend to at once, unless a single one has more


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with more than one new token: a span of the flat batch and where its K, V are."""

    flat_start: int
    num_new: int
    row: int
    runs: tuple[Run, ...]  # its keys, behind each other

    @property
    def num_keys(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    @property
    def num_pages(self) -> int:
        return sum(run.num_tokens // BLOCK_TOKENS for run in self.runs if run.sealed)

    @property
    def is_fresh(self) -> bool:
        """The chunk is all there is: it attends to itself alone."""
        return self.num_keys == self.num_new


@dataclass(slots=True)
class StepIndex:
    """Where a group's tables say that a plan's tokens go; on the host.

    append_positions, append_offsets: of each new token, its exact page (128-byte units) and its
        place in it.
    tokens, rows, exact, blocks: of each sequence with one new token, its place in the flat batch,
        table row, exact tokens (the new one among them) and page table entries to visit.
    hidden, visible: of a window, those exact tokens that it has left, and the position where it
        begins; empty without a window.
    num_pages: those entries without holes, together.
    """

    append_positions: np.ndarray[Any, Any]
    append_offsets: np.ndarray[Any, Any]
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    exact: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)
    num_pages: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    @classmethod
    def of(cls, group: LayerGroup, plan: StepPlan) -> StepIndex:
        """Look up where the plan's tokens go in the group's tables."""
        table = group.exact_table.host.numpy()
        found = cls(
            np.empty(plan.num_tokens, dtype=np.int32), np.empty(plan.num_tokens, dtype=np.int32)
        )
        flat = 0
        for entry in plan.entries:
            slots = group.sequences[entry.seq_id]
            first = entry.start - slots.tail_start
            if entry.num_new == 1:
                found.append_positions[flat] = table[slots.row, first // EXACT_PAGE_TOKENS]
                found.append_offsets[flat] = first % EXACT_PAGE_TOKENS
                found.tokens.append(flat)
                found.rows.append(slots.row)
                found.exact.append(first + 1)
                found.blocks.append(slots.num_sealed)
                found.num_pages += slots.num_sealed_pages
                if group.window is not None:
                    visible = max(0, entry.start + 1 - group.window)
                    found.visible.append(visible)
                    found.hidden.append(slots.exact_before(visible))
            else:
                end = flat + entry.num_new
                places = np.arange(first, first + entry.num_new)
                row = table[slots.row]
                found.append_positions[flat:end] = row[places // EXACT_PAGE_TOKENS]
                found.append_offsets[flat:end] = places % EXACT_PAGE_TOKENS
                runs = group.runs(entry.seq_id, entry.start + entry.num_new)
                found.chunks.append(Chunk(flat, entry.num_new, slots.row, runs))
            flat += entry.num_new
        return found

    @property
    def pages_attended(self) -> int:
        """Pages that a layer of the group reads in this step."""
        return self.num_pages + sum(chunk.num_pages for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """N sequences with one new token each, as kernels take them.

    exact_table, page_table: their rows of the group's tables.
    exact, blocks: int32 `[N]`, tokens and entries to read there.
    plans: what `decode_attention` of all layers shares.
    has_pages: False where no sequence of the batch has a page.
    first_exact, first_visible: of a window, int32 `[N]`, the first token that a query sees, counted
        in its sequence's exact pages, and as a position; None without.
    """

    exact_table: Tensor
    page_table: Tensor
    exact: Tensor
    blocks: Tensor
    plans: dict[str, Any]
    has_pages: bool
    first_exact: Tensor | None = None
    first_visible: Tensor | None = None

    @classmethod
    def of(
        cls,
        group: LayerGroup,
        rows: Tensor,
        exact: Tensor,
        blocks: Tensor,
        *,
        max_exact_pages: int,
        max_blocks: int,
        format: PageFormat,
        ops: PageOps,
        window: tuple[Tensor, Tensor] | None = None,
    ) -> DecodeBatch:
        """From int32 `[N]` on the device; nothing here asks the device for a value.

        Args:
            max_exact_pages, max_blocks: bounds on what all sequences together read; 0 blocks means
                that there are no pages.
            window: `first_exact` and `first_visible`; needed where the group has a window.
        """
        first_exact, first_visible = (None, None) if window is None else window
        plans = ops.exact_plan(exact, max_exact_pages, format.num_kv_heads)
        if max_blocks and group.layout is not None:
            plans |= ops.page_plan(group.layout, blocks, max_blocks)
        return cls(
            group.exact_table.device[rows],
            group.page_table.device[rows],
            exact,
            blocks,
            plans,
            max_blocks > 0,
            first_exact,
            first_visible,
        )


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """Chunks that attend together; `tokens` are their places in the flat batch (None: all)."""

    chunks: tuple[Chunk, ...]
    spans: ChunkSpans
    tokens: Tensor | None

    @property
    def is_fresh(self) -> bool:
        return all(chunk.is_fresh for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class GroupStep:
    """Index tensors of a step for one group; T new tokens.

    append_positions, append_offsets: int `[T]`.
    decode: sequences with one new token; None without.
    decode_tokens: int64 `[N]`, their places in the flat batch; None: the batch is nothing else.
    chunks: the other sequences, a few at a time.
    """

    append_positions: Tensor
    append_offsets: Tensor
    decode: DecodeBatch | None
    decode_tokens: Tensor | None
    chunks: tuple[ChunkBatch, ...]

    @classmethod
    def of(cls, group: LayerGroup, index: StepIndex, format: PageFormat, ops: PageOps) -> GroupStep:
        """The step as `index` has it."""
        device = group.exact_table.device.device
        num_tokens = len(index.append_positions)
        decode = tokens = None
        if index.tokens:
            window = [index.hidden, index.visible] if group.window is not None else []
            rows, exact, blocks, *seen = upload_rows(
                [index.rows, index.exact, index.blocks, *window], device
            )
            decode = DecodeBatch.of(
                group,
                rows,
                exact,
                blocks,
                max_exact_pages=sum(-(-count // EXACT_PAGE_TOKENS) for count in index.exact),
                max_blocks=sum(index.blocks) if index.num_pages else 0,
                format=format,
                ops=ops,
                window=(seen[0], seen[1]) if seen else None,
            )
            if len(index.tokens) < num_tokens:
                tokens = upload(index.tokens, torch.long, device)
        return cls(
            upload(index.append_positions, torch.int32, device),
            upload(index.append_offsets, torch.int32, device),
            decode,
            tokens,
            tuple(chunk_batches(index.chunks, num_tokens, device)),
        )


def chunk_batches(chunks: list[Chunk], num_tokens: int, device: torch.device) -> list[ChunkBatch]:
    """Cut chunks so that each batch's history fits the transient buffer of `HISTORY_TOKENS`."""
    batches: list[list[Chunk]] = []
    held = 0
    for chunk in chunks:
        if not batches or held + chunk.num_keys > HISTORY_TOKENS:
            batches.append([])
            held = 0
        batches[-1].append(chunk)
        held += chunk.num_keys
    found = []
    for batch in batches:
        spans = ChunkSpans.of([c.num_new for c in batch], [c.num_keys for c in batch], device)
        tokens = None
        if spans.q_ends[-1] < num_tokens:
            places = [np.arange(c.flat_start, c.flat_start + c.num_new) for c in batch]
            tokens = upload(np.concatenate(places), torch.long, device)
        found.append(ChunkBatch(tuple(batch), spans, tokens))
    return found


class OpenStep:
    """A step between `begin_step` and `end_step`.

    Attributes:
        plan: what it computes.
        index: where its tokens go, a group each.
    """

    def __init__(
        self, plan: StepPlan, groups: Sequence[LayerGroup], format: PageFormat, ops: PageOps
    ) -> None:
        self.plan = plan
        self.index = [StepIndex.of(group, plan) for group in groups]
        self._args = groups, format, ops
        self._steps: list[GroupStep] | None = None

    @property
    def steps(self) -> list[GroupStep]:
        """The index tensors, made when a layer first asks: a replayed graph never does."""
        if self._steps is None:
            groups, format, ops = self._args
            self._steps = [
                GroupStep.of(group, index, format, ops)
                for group, index in zip(groups, self.index, strict=True)
            ]
        return self._steps
