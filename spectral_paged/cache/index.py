"""The index of an open step gives the places where a group's kernels write and read tokens.

```
StepPlan  ->  StepIndex (host: where tokens go, who reads what)  ->  GroupStep (the device's)
```

A step in which every sequence has one new token needs only a `DecodeBatch` of fixed shape, which
CUDA graphs replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_paged.cache.decode_rows import DecodeRows
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.plan import StepPlan
from spectral_paged.cache.prefix_tiles import TiledReads
from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.cache.stats import CacheCounters
from spectral_paged.cache.step_sequences import StepSequences
from spectral_paged.cache.token_places import TokenRun
from spectral_paged.device import upload, upload_rows
from spectral_paged.kernels.chunk.reference import KEY_GAP, ChunkSpans
from spectral_paged.kernels.decode.batch import ExactTokens, Pages
from spectral_paged.kernels.decode.shared_pages import SharedPages
from spectral_paged.kernels.exact.reference import ExactPlaces
from spectral_paged.kernels.ops import PageOps
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.kernels.rebuild.reference import PagePlaces

Array = np.ndarray[Any, Any]

HISTORY_TOKENS = 32_768  # keys that chunks attend to at once, unless a single one has more


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with more than one new token: its span of the flat batch and its K, V runs."""

    flat_start: int
    num_new: int
    row: int
    runs: tuple[TokenRun, ...]  # of its keys, in the order in which they are concatenated

    @property
    def num_keys(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    @property
    def num_pages(self) -> int:
        return sum(run.num_tokens // BLOCK_TOKENS for run in self.runs if run.sealed)

    @property
    def is_fresh(self) -> bool:
        """True if nothing is stored before the chunk, so that it attends to itself only."""
        return self.num_keys == self.num_new


@dataclass(slots=True)
class StepIndex:
    """The places of a plan's tokens by a group's tables, on the host.

    append: `[2, T]`, each new token's exact page (its unit) and its place in that page.
    decode: `[7, N]`, the `DecodeRows` of sequences with one new token, and of drafts.
    tokens: places of those N tokens in the flat batch.
    num_blocks: page table entries that those tokens read together; 0 if none has a page.
    chunks: the other sequences.
    pages_attended: pages that queries of a layer of the group attend to in this step.
    tiles: the tiles of sequences with one new token that read pages together; None: there are none.
    """

    append: Array
    decode: Array
    tokens: Array
    num_blocks: int
    chunks: list[Chunk]
    pages_attended: int
    tiles: TiledReads | None = None

    @property
    def own_blocks(self) -> int:
        """The page table entries that sequences with one new token read themselves."""
        return self.num_blocks if self.tiles is None else self.tiles.own_entries

    @property
    def tile_blocks(self) -> int:
        """The page table entries that tiles read for them."""
        return 0 if self.tiles is None else self.tiles.tile_entries

    def count_reads(self, counters: CacheCounters, num_layers: int) -> None:
        """Count the pages that queries of `num_layers` layers attend to, and those read at once."""
        counters.pages_attended += self.pages_attended * num_layers
        if self.tiles is not None:
            counters.pages_shared += self.tiles.pages_saved * num_layers

    @classmethod
    def of(
        cls, group: LayerGroup, place: int, plan: StepPlan, sequences: StepSequences
    ) -> StepIndex:
        """The index of `plan` in `group`, the cache's at `place`."""
        states, rows, starts = sequences.states, sequences.rows, plan.starts
        if plan.is_decode and plan.drafted is None:
            decode, num_pages = group.decode_table.at(
                rows, starts, lambda i: states[i].slots[place]
            )
            num_blocks, tiles = _page_reads(group, rows, decode, num_pages)
            return cls(decode[:2], decode, np.arange(len(rows)), num_blocks, [], num_pages, tiles)
        decodes = plan.counts == 1
        if plan.drafted is not None:
            decodes |= plan.drafted
        single = decodes.nonzero()[0]
        decode, num_pages = _rows_by_token(
            group,
            rows[single],
            starts[single],
            plan.counts[single],
            lambda i: states[single[i]].slots[place],
        )
        by_token = np.repeat(rows[single], plan.counts[single])
        num_blocks, tiles = _page_reads(group, by_token, decode, num_pages)
        flat = np.cumsum(plan.counts) - plan.counts  # where each sequence's tokens begin
        tokens = np.repeat(decodes, plan.counts).nonzero()[0]
        append = np.empty((2, plan.num_tokens), np.int32)
        append[:, tokens] = decode[:2]
        table = group.exact_table.host.numpy()
        chunks = []
        for i in (~decodes).nonzero()[0].tolist():
            slots, start = states[i].slots[place], int(starts[i])
            begin, num_new = int(flat[i]), int(plan.counts[i])
            first = start - slots.tail_start  # place of the first token among the exact ones
            inside = np.arange(first, first + num_new)
            append[:, begin : begin + num_new] = (
                table[slots.row, inside // EXACT_PAGE_TOKENS],
                inside % EXACT_PAGE_TOKENS,
            )
            chunks.append(Chunk(begin, num_new, slots.row, slots.chunk_runs(start + num_new)))
        attended = num_pages + sum([chunk.num_pages for chunk in chunks])
        return cls(append, decode, tokens, num_blocks, chunks, attended, tiles)


def _page_reads(
    group: LayerGroup, rows: Array, decode: Array, num_pages: int
) -> tuple[int, TiledReads | None]:
    """The page table entries that queries of a decode step attend to, and the step's tiles."""
    if not num_pages:
        return 0, None
    blocks = DecodeRows(*decode).blocks
    return int(blocks.sum()), None if group.tiles is None else group.tiles.of(rows, blocks)


def _rows_by_token(
    group: LayerGroup,
    rows: Array,
    starts: Array,
    counts: Array,
    slots: Callable[[int], SequenceSlots],
) -> tuple[Array, int]:
    """`DecodeRows` of every token of some sequences, `[7, T]`, and the pages that they read.

    A sequence's tokens follow each other, and see the ones before them as stored tokens.

    Args:
        rows, starts, counts: int64 `[N]`, each sequence's row, its first token's position, and the
            number of its tokens.
        slots: the slots of the i-th sequence.
    """
    table = group.decode_table
    begins = np.cumsum(counts) - counts
    found = np.empty((len(DecodeRows._fields), int(counts.sum())), np.int64)
    num_pages = 0
    for ahead in range(int(counts.max(initial=0))):
        places = (counts > ahead).nonzero()[0]

        def slots_of(i: int, places: Array = places) -> SequenceSlots:
            return slots(int(places[i]))

        found[:, begins[places] + ahead], pages = table.at(
            rows[places], starts[places] + ahead, slots_of
        )
        num_pages += pages
    table.forget(rows[counts > 1])  # the next step may begin before these tokens
    return found, num_pages


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """N new tokens that attend one by one, as kernels take them; `pages` is None if no sequence
    has a page."""

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
        tiles: tuple[Tensor, ...] | None = None,
        max_shared: int = 0,
    ) -> DecodeBatch:
        """The batch of `rows` on the device, made without reading a value back from it.

        Args:
            max_exact_pages, max_blocks: bounds on the exact pages and page table entries that all
                sequences read together themselves.
            tiles: the columns of `TiledReads`, int32 `[N]` each; None: there are no tiles.
            max_shared: a bound on the page table entries that tiles read together. Without any of
                either, the batch has no pages.
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
        if max_blocks + max_shared and group.layout is not None:
            table, shared = group.page_table.device[rows.table_row], None
            if tiles is not None and group.tiles is not None:
                seats, starts = tiles
                shared = SharedPages.of(
                    seats,
                    starts,
                    table,
                    num_kv_heads=group.layout.num_kv_heads,
                    seats_per_tile=group.tiles.seats,
                )
            found = Pages(
                table,
                rows.blocks,
                group.layout,
                group.rotation,
                rows.first_visible if slides else None,
                shared=shared,
            )
            pages = ops.plan_pages(found, max_blocks, max_shared)
        return cls(ops.plan_exact(exact, max_exact_pages), pages)


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """The exact pages and the pages of a batch's chunks, and the rows that their tokens belong to.

    All layers of a group share it.

    page_units, pages: None if no chunk sees a page.
    gaps: int64, the rows between chunks; None if there are none.
    """

    exact: ExactPlaces
    page_units: Tensor | None
    pages: PagePlaces | None
    gaps: Tensor | None

    @classmethod
    def of(cls, group: LayerGroup, chunks: Sequence[Chunk], spans: ChunkSpans) -> StoredKeys:
        """What the host's tables say of `chunks`."""
        exact: list[Array] = []
        pages: list[Array] = []
        for chunk, (_, keys) in zip(chunks, spans, strict=True):
            row = keys.start
            for run in chunk.runs:
                table = group.page_table if run.sealed else group.exact_table
                units = table.host[chunk.row, run.start : run.stop].numpy()
                places = np.arange(run.start, run.stop)
                if run.sealed:  # a hole is a block that is exact, or gone
                    units, places = units[units >= 0], places[units >= 0]
                    rows = row + BLOCK_TOKENS * np.arange(len(units))
                    pages.append(np.stack((units, places, rows)))
                else:
                    before = EXACT_PAGE_TOKENS * np.arange(len(units))
                    counts = np.minimum(run.num_tokens - before, EXACT_PAGE_TOKENS)
                    exact.append(np.stack((units, row + before, counts)))
                row += run.num_tokens
        device = group.exact_table.device.device
        copied = ExactPlaces(*upload_rows(np.concatenate(exact, axis=1), device))
        between = [slice(start, start + spans.gap) for start in spans.gap_starts]
        gaps = _places(between, device) if between else None
        if not pages:
            return cls(copied, None, None, gaps)
        page_units, *rest = upload_rows(np.concatenate(pages, axis=1), device)
        return cls(copied, page_units, PagePlaces(*rest), gaps)


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """Chunks that attend together.

    tokens: int64, their places in the flat batch; None: all.
    key_rows: int64, the rows of the keys of chunks without history; None if they lie without gaps,
        or if a chunk has history.
    stored: where keys come from; None if no chunk has history.
    """

    chunks: tuple[Chunk, ...]
    spans: ChunkSpans
    tokens: Tensor | None
    key_rows: Tensor | None
    stored: StoredKeys | None = None

    @property
    def is_fresh(self) -> bool:
        return all(chunk.is_fresh for chunk in self.chunks)

    def located(self, group: LayerGroup) -> ChunkBatch:
        """The batch with `stored` by the group's tables."""
        return replace(self, stored=StoredKeys.of(group, self.chunks, self.spans))


@dataclass(frozen=True, slots=True)
class GroupStep:
    """The index tensors of a step for one group; T new tokens.

    append_units, append_offsets: int32 `[T]`, units of exact pages, and places in those pages.
    decode: sequences with one new token, and drafts; None if there are none.
    decode_tokens: int64 `[N]`, their places in the flat batch; None if they are the whole batch.
    chunks: the other sequences, in batches.
    """

    append_units: Tensor
    append_offsets: Tensor
    decode: DecodeBatch | None
    decode_tokens: Tensor | None
    chunks: tuple[ChunkBatch, ...]

    @classmethod
    def of(cls, group: LayerGroup, index: StepIndex, ops: PageOps) -> GroupStep:
        """The index tensors of `index` on the group's device."""
        device = group.exact_table.device.device
        num_tokens = index.append.shape[1]
        decode = tokens = None
        if len(index.tokens):
            rows = DecodeRows(*upload_rows(index.decode, device))
            num_exact, tiles = DecodeRows(*index.decode).exact, None
            if index.tiles is not None:
                tiles = upload_rows(index.tiles.columns, device)
            decode = DecodeBatch.of(
                group,
                rows,
                max_exact_pages=int((-(-num_exact // EXACT_PAGE_TOKENS)).sum()),
                max_blocks=index.own_blocks,
                ops=ops,
                tiles=tiles,
                max_shared=index.tile_blocks,
            )
            if not index.chunks:
                return cls(rows.append_unit, rows.append_offset, decode, None, ())
            tokens = upload(index.tokens, torch.long, device)
        units, offsets = upload_rows(index.append, device)
        chunks = tuple(
            batch if batch.is_fresh else batch.located(group)
            for batch in chunk_batches(index.chunks, num_tokens, device)
        )
        return cls(units, offsets, decode, tokens, chunks)


def chunk_batches(chunks: list[Chunk], num_tokens: int, device: torch.device) -> list[ChunkBatch]:
    """Batches of chunks whose keys fit the transient buffer of `HISTORY_TOKENS`, with gaps between
    them; a chunk alone has none."""
    batches: list[list[Chunk]] = []
    held = 0
    for chunk in chunks:
        if not batches or held + KEY_GAP + chunk.num_keys > HISTORY_TOKENS:
            batches.append([])
            held = -KEY_GAP
        batches[-1].append(chunk)
        held += KEY_GAP + chunk.num_keys
    found = []
    for batch in batches:
        counts = [c.num_new for c in batch], [c.num_keys for c in batch]
        spans = ChunkSpans.of(*counts, device, gap=KEY_GAP if len(batch) > 1 else 0)
        tokens = key_rows = None
        if spans.q_ends[-1] < num_tokens:
            flat = [slice(c.flat_start, c.flat_start + c.num_new) for c in batch]
            tokens = _places(flat, device)
        if spans.gap and all(chunk.is_fresh for chunk in batch):
            key_rows = _places([keys for _, keys in spans], device)
        found.append(ChunkBatch(tuple(batch), spans, tokens, key_rows))
    return found


def _places(spans: Sequence[slice], device: torch.device) -> Tensor:
    """The places inside `spans`, int64 on the device."""
    return upload(np.concatenate([np.arange(s.start, s.stop) for s in spans]), torch.long, device)


class OpenStep:
    """A step between `begin_step` and `end_step`.

    Attributes:
        plan: the sequences and tokens of the step.
        sequences: those of the plan's entries.
        index: the places of the step's tokens, one item a group.
    """

    def __init__(
        self,
        plan: StepPlan,
        sequences: StepSequences,
        groups: Sequence[LayerGroup],
        ops: PageOps,
    ) -> None:
        self.plan = plan
        self.sequences = sequences
        self.index = [
            StepIndex.of(group, place, plan, sequences) for place, group in enumerate(groups)
        ]
        self._args = groups, ops
        self._steps: list[GroupStep] | None = None

    @property
    def steps(self) -> list[GroupStep]:
        """The index tensors, made at the first access; a replayed graph never needs them."""
        if self._steps is None:
            groups, ops = self._args
            self._steps = [
                GroupStep.of(group, index, ops)
                for group, index in zip(groups, self.index, strict=True)
            ]
        return self._steps
