"""Index tensors of an open step: where a group's kernels write new tokens and what they read.

```
StepPlan  ->  StepIndex (host: where tokens go, who reads what)  ->  GroupStep (the device's)
```

A step in which every sequence has one new token needs no more than a `DecodeBatch` of fixed shape,
which is what a CUDA graph replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.plan import StepPlan
from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.cache.token_places import TokenRun
from spectral_paged.device import upload, upload_rows
from spectral_paged.kernels.chunk.reference import ChunkSpans
from spectral_paged.kernels.decode.batch import ExactTokens, Pages
from spectral_paged.kernels.ops import PageOps
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS

Array = np.ndarray[Any, Any]
Column = TypeVar("Column")  # an array, a tensor, or a list

HISTORY_TOKENS = 32_768  # keys that chunks attend to at once, unless a single one has more


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with more than one new token: a span of the flat batch and where its K, V are."""

    flat_start: int
    num_new: int
    row: int
    runs: tuple[TokenRun, ...]  # its keys, behind each other

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


class DecodeRows(NamedTuple, Generic[Column]):
    """Sequences with one new token each, as a group's kernels are told of them: int32 `[N]` each.

    The one declaration of the columns of a decode step: the host's index, the inputs of a CUDA
    graph and `DecodeBatch` take them from here, in this order.

    append_unit, append_offset: of the new token, its exact page (in units of 128 bytes; negative:
        it is stored nowhere) and its place in that page.
    table_row: row of the group's tables.
    exact, blocks: exact tokens (the new one among them) and page table entries to read.
    first_exact, first_visible: the first token that the query sees, counted in its sequence's exact
        pages, and as a position; 0 without a window.
    """

    append_unit: Column
    append_offset: Column
    table_row: Column
    exact: Column
    blocks: Column
    first_exact: Column
    first_visible: Column


@dataclass(slots=True)
class StepIndex:
    """Where a group's tables say that a plan's tokens go; on the host.

    append: int32 `[2, T]`, of each new token its exact page (in units of 128 bytes) and its place
        in that page.
    decode: int32 `[7, N]`, the `DecodeRows` of sequences with one new token.
    tokens: their places in the flat batch.
    num_blocks: page table entries that they read together; 0 where none has a page.
    chunks: the other sequences.
    pages_attended: pages that a layer of the group reads in this step.
    """

    append: Array
    decode: Array
    tokens: list[int]
    num_blocks: int
    chunks: list[Chunk]
    pages_attended: int

    @classmethod
    def of(cls, group: LayerGroup, plan: StepPlan, held: Sequence[SequenceSlots]) -> StepIndex:
        """Look up where the plan's tokens go in the group's tables; `held` by its sequences."""
        table, window = group.exact_table.host.numpy(), group.window
        tokens: list[int] = []
        chunks: list[Chunk] = []
        places: list[Array] = []  # where the chunks' tokens go
        columns: DecodeRows[list[int]] = DecodeRows([], [], [], [], [], [], [])
        units, offsets, table_rows, exact, blocks, first_exact, first_visible = columns
        flat = num_pages = visible = hidden = 0
        for entry, slots in zip(plan.entries, held, strict=True):
            first = entry.start - slots.tail_start  # its place in what exact pages hold
            if entry.num_new == 1:
                if window is not None:
                    visible = max(0, entry.start + 1 - window)
                    hidden = slots.exact_before(visible)
                row = slots.row
                tokens.append(flat)
                units.append(table.item(row, first // EXACT_PAGE_TOKENS))
                offsets.append(first % EXACT_PAGE_TOKENS)
                table_rows.append(row)
                exact.append(first + 1)
                blocks.append(slots.num_sealed)
                first_exact.append(hidden)
                first_visible.append(visible)
                num_pages += slots.num_sealed_pages
            else:
                inside = np.arange(first, first + entry.num_new)
                units_of = table[slots.row, inside // EXACT_PAGE_TOKENS]
                places.append(np.stack((units_of, inside % EXACT_PAGE_TOKENS)))
                runs = slots.chunk_runs(entry.start + entry.num_new)
                chunks.append(Chunk(flat, entry.num_new, slots.row, runs))
            flat += entry.num_new
        decode = np.array(columns, np.int32)
        append = decode[:2]
        if chunks:
            append = np.empty((2, flat), np.int32)
            append[:, tokens] = decode[:2]
            for chunk, where in zip(chunks, places, strict=True):
                append[:, chunk.flat_start : chunk.flat_start + chunk.num_new] = where
        attended = num_pages + sum([chunk.num_pages for chunk in chunks])
        return cls(append, decode, tokens, sum(blocks) if num_pages else 0, chunks, attended)


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """N sequences with one new token each, as kernels take them; `pages` is None where no sequence
    has one."""

    exact: ExactTokens
    pages: Pages | None

    @classmethod
    def of(
        cls,
        group: LayerGroup,
        rows: DecodeRows[Tensor],
        *,
        max_exact_pages: int,
        max_blocks: int,
        ops: PageOps,
    ) -> DecodeBatch:
        """From rows on the device; nothing here asks the device for a value.

        Args:
            max_exact_pages, max_blocks: bounds on what all sequences together read; 0 blocks means
                that there are no pages.
        """
        slides = group.window is not None
        exact = ExactTokens(
            group.exact_table.device[rows.table_row],
            rows.exact,
            group.arena.format.num_kv_heads,
            group.arena.dtype,
            rows.first_exact if slides else None,
        )
        pages = None
        if max_blocks and group.layout is not None:
            found = Pages(
                group.page_table.device[rows.table_row],
                rows.blocks,
                group.layout,
                group.rotation,
                rows.first_visible if slides else None,
            )
            pages = ops.plan_pages(found, max_blocks)
        return cls(ops.plan_exact(exact, max_exact_pages), pages)


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

    append_units, append_offsets: int32 `[T]`, exact pages in units of 128 bytes, places in them.
    decode: sequences with one new token; None without.
    decode_tokens: int64 `[N]`, their places in the flat batch; None: the batch is nothing else.
    chunks: the other sequences, a few at a time.
    """

    append_units: Tensor
    append_offsets: Tensor
    decode: DecodeBatch | None
    decode_tokens: Tensor | None
    chunks: tuple[ChunkBatch, ...]

    @classmethod
    def of(cls, group: LayerGroup, index: StepIndex, ops: PageOps) -> GroupStep:
        """The step as `index` has it."""
        device = group.exact_table.device.device
        num_tokens = index.append.shape[1]
        decode = tokens = None
        if index.tokens:
            rows = DecodeRows(*upload_rows(index.decode, device))
            num_exact = DecodeRows(*index.decode).exact.tolist()
            decode = DecodeBatch.of(
                group,
                rows,
                max_exact_pages=sum([-(-count // EXACT_PAGE_TOKENS) for count in num_exact]),
                max_blocks=index.num_blocks,
                ops=ops,
            )
            if not index.chunks:
                return cls(rows.append_unit, rows.append_offset, decode, None, ())
            tokens = upload(index.tokens, torch.long, device)
        units, offsets = upload_rows(index.append, device)
        chunks = tuple(chunk_batches(index.chunks, num_tokens, device))
        return cls(units, offsets, decode, tokens, chunks)


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
        sequences: of the plan's entries.
        index: where its tokens go, a group each.
    """

    def __init__(
        self,
        plan: StepPlan,
        sequences: Sequence[SequenceState],
        groups: Sequence[LayerGroup],
        ops: PageOps,
    ) -> None:
        self.plan = plan
        self.sequences = sequences
        self.index = [
            StepIndex.of(group, plan, [state.slots[place] for state in sequences])
            for place, group in enumerate(groups)
        ]
        self._args = groups, ops
        self._steps: list[GroupStep] | None = None

    @property
    def steps(self) -> list[GroupStep]:
        """The index tensors, made when a layer first asks: a replayed graph never does."""
        if self._steps is None:
            groups, ops = self._args
            self._steps = [
                GroupStep.of(group, index, ops)
                for group, index in zip(groups, self.index, strict=True)
            ]
        return self._steps
