"""`spectral-paged bench decode --shared N`: N questions on one document, against N documents.

Three batches have the same queries, and as many pages behind each of them. Times are of the whole
attention op (landmarks, pages and tail), of replayed CUDA graphs.

```
documents    every sequence has pages of its own
alone        all have the pages of one document, and each reads them for itself
shared       all have the pages of one document, and tiles of sequences read them together
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_paged.benchmarks.decode.inputs import LANDMARKS, ExactPages, Pages
from spectral_paged.benchmarks.decode.run import (
    MAX_ERROR,
    ROPE_THETA,
    SHAPES,
    TAIL,
    formats_of,
    graph_ms,
    worst_error,
)
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import write_result
from spectral_paged.cache import PrefixTiles
from spectral_paged.errors import InvalidRequestError
from spectral_paged.kernels.decode import batch
from spectral_paged.kernels.decode.batch import ExactTokens
from spectral_paged.kernels.decode.gpu import decode_attention, planned_pages
from spectral_paged.kernels.decode.shared_pages import SharedPages, seats_per_tile
from spectral_paged.kernels.math.rotary import Rotation
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, UNIT_BYTES
from spectral_paged.pages import PageFormat
from spectral_paged.pool.block_table import BlockTable
from spectral_paged.rope import RotaryTable

DOCUMENT = 32768  # tokens
SAME = 2e-3  # largest relative difference of the shared reads from those of each sequence alone


@dataclass(frozen=True, slots=True)
class SharedRow:
    """The milliseconds of the three batches, and what sharing gains.

    difference: of the shared output from that of each sequence alone, relative.
    """

    shape: str
    format: str
    sharers: int
    tokens: int
    documents_ms: float
    alone_ms: float
    shared_ms: float
    speedup: float  # of the shared reads against separate documents
    difference: float


def tiles_of(table: Tensor, counts: Tensor, heads: int, seats: int) -> tuple[SharedPages, int, int]:
    """The tiles of a page table, and the entries that sequences and tiles read.

    Raises:
        InvalidRequestError: too little is shared for tiles.
    """
    host = BlockTable(len(table), table.shape[1], -2, torch.device("cpu"))
    for row, line in enumerate(table.tolist()):
        host.write(row, 0, line)
    found = PrefixTiles(host, seats).of(np.arange(len(table)), counts.cpu().numpy())
    if found is None:
        raise InvalidRequestError(
            f"{len(table)} sequences share too little for tiles of {seats}: raise --shared"
        )
    columns = torch.from_numpy(found.columns).to(table.device)
    shared = SharedPages.of(columns[0], columns[1], table, num_kv_heads=heads, seats_per_tile=seats)
    return shared, found.own_entries, found.tile_entries


def measured(shape: str, format: PageFormat, sharers: int, rope: RotaryTable) -> SharedRow:
    """The row of a shape and a format.

    Raises:
        InvalidRequestError: shared reads give another result, or too little is shared.
    """
    num_q_heads, heads, dim = SHAPES[shape]
    q = torch.randn(sharers, num_q_heads, dim, dtype=torch.bfloat16, device="cuda")
    pages = Pages.random(format, [DOCUMENT] * sharers, rope)
    exact = ExactPages.random([LANDMARKS + TAIL] * sharers, heads, dim)
    plane = torch.cat((pages.plane, exact.plane))
    tokens = ExactTokens(
        exact.table + len(pages.plane) // UNIT_BYTES,
        exact.tokens,
        heads,
        torch.bfloat16,
        plan=exact.plan,
    )
    one = pages.table[:1].repeat(sharers, 1)
    seats = seats_per_tile(num_q_heads // heads)
    shared, own, of_tiles = tiles_of(one, pages.counts, heads, seats)
    rotation, scores = Rotation(rope.cos, rope.sin, LANDMARKS), Scores(dim**-0.5)
    total = sharers * (DOCUMENT // BLOCK_TOKENS)

    def op(table: Tensor, shared: SharedPages | None, *bounds: int) -> Callable[[], Tensor]:
        given = batch.Pages(table, pages.counts, format.layout, rotation, shared=shared)
        planned = planned_pages(given, *bounds)
        return lambda: decode_attention(q, plane, tokens, planned, scores, pages.basis)

    ways = op(pages.table, None, total), op(one, None, total), op(one, shared, own, of_tiles)
    want, got = ways[1]().float(), ways[2]().float()
    difference = float((got - want).norm() / want.norm())
    if not difference <= SAME:
        raise InvalidRequestError(f"{format.name} at {shape}: shared reads differ by {difference}")
    documents, alone, together = (graph_ms(way) for way in ways)
    gain = documents / together
    return SharedRow(
        shape, format.name, sharers, DOCUMENT, documents, alone, together, gain, difference
    )


def main(
    *, sharers: int, output_dir: Path, shapes: Sequence[str] = (), formats: Sequence[str] = ()
) -> int:
    """Measure, print the rows, and write `decode-shared.json`.

    Raises:
        InvalidRequestError: an unknown shape, or too few sharers; shared reads give another result.
    """
    if unknown := [s for s in shapes if s not in SHAPES]:
        raise InvalidRequestError(f"--shape {', '.join(unknown)}: use {', '.join(SHAPES)}")
    rows: list[dict[str, Any]] = []
    for shape in shapes or ("llama-3-8b",):
        num_q_heads, heads, dim = SHAPES[shape]
        if seats_per_tile(num_q_heads // heads) < 2:
            print(f"{shape}: a KV head has so many queries that no tile takes two sequences")
            continue
        rope = RotaryTable.from_theta(ROPE_THETA, dim, max_positions=40_000, device="cuda")
        for format in formats_of(shape, formats or ("spectral-quality",)):
            error = worst_error(format, num_q_heads, rope)
            if error > MAX_ERROR:
                print(f"{format.name} at {shape}: error {error:.1e} against the twin, so no row")
                continue
            row = measured(shape, format, sharers, rope)
            print(
                f"{shape:13} {format.name:18} {sharers} x {DOCUMENT}: documents "
                f"{row.documents_ms:.4f} ms, alone {row.alone_ms:.4f} ms, shared "
                f"{row.shared_ms:.4f} ms: {row.speedup:.2f}x of separate documents, difference "
                f"{row.difference:.1e}",
                flush=True,
            )
            rows.append(asdict(row))
            torch.cuda.empty_cache()
    result = {"environment": environment(), "gpu": torch.cuda.get_device_name(), "rows": rows}
    print(write_result(output_dir, "decode-shared", result))
    return 0
