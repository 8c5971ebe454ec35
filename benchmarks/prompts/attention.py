"""Attention of prompt chunks alone: every backend that this machine has, beside each other.

A chunk is fresh (it attends to itself), or the last queries of longer keys. Every backend is first
compared with the fp32 twin. Keys and values lie as the engine gives them: the model's own for fresh
chunks, heads apart for rebuilt history.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.chunk.gpu import BACKENDS, chunk_attention
from spectral_paged.kernels.chunk.reference import KEY_GAP, ChunkSpans, chunk_attention as twin
from spectral_paged.models.geometry import ModelGeometry

KEYS = (2_048, 8_192, 32_768, 131_072)
QUERIES = (2_048, 8_192)
REPEATS = 5
SLOW_FROM = 16_384  # keys from which torch's plain attention is not timed on a GPU
FLUSHED_BYTES = 1 << 30  # written between two runs: more than any cache, longer than a launch
MAX_ERROR = 1e-2  # of results, relative, in half precision


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """The median milliseconds of one chunk by one backend, and the spread of the runs.

    error: relative, against the fp32 twin on small chunks.
    """

    backend: str
    keys: int
    queries: int
    ms: float
    least_ms: float
    most_ms: float
    tflops_per_second: float
    error: float


def backends(kind: ChunkKind) -> list[str]:
    """The backends that attend to chunks of `kind` here."""
    # `math` is the code of `sdpa` as long as no score is capped
    return [n for n, one in BACKENDS.items() if n != "math" and one.obstacle(kind) is None]


def cases(keys: Sequence[int], queries: Sequence[int]) -> list[tuple[int, int]]:
    """Keys and queries: each number of keys fresh, then with fewer queries."""
    return [(k, n) for k in keys for n in (k, *(n for n in queries if n < k))]


def operations(keys: int, queries: int, num_q_heads: int, dim: int) -> int:
    """Multiplications and additions of causal attention, what is masked not counted."""
    seen = queries * (keys - queries) + queries * (queries + 1) // 2
    return 4 * num_q_heads * dim * seen


def draw(
    keys: int, queries: int, geometry: ModelGeometry, kind: ChunkKind
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q `[T, Hq, D]`, and k and v `[Hkv, L, D]`."""
    generator = torch.Generator(kind.device).manual_seed(keys + queries)

    def normal(*shape: int) -> Tensor:
        x = torch.empty(*shape, dtype=kind.dtype, device=kind.device)
        return x.normal_(generator=generator)

    q = normal(queries, geometry.num_q_heads, kind.dim)
    heads = geometry.num_kv_heads
    if keys == queries:
        k, v = (normal(keys, heads, kind.dim).transpose(0, 1) for _ in range(2))
    else:
        k, v = (normal(heads, keys, kind.dim) for _ in range(2))
    return q, k, v


def error(by: str, geometry: ModelGeometry, kind: ChunkKind) -> float:
    """The relative error of a backend on two chunks, one of them with history.

    Raises:
        ArithmeticError: it is larger than half precision explains.
    """
    spans = ChunkSpans.of([97, 130], [257, 130], kind.device, gap=KEY_GAP)
    q, k, v = draw(spans.num_key_rows, spans.q_ends[-1], geometry, kind)
    options = {"spans": spans, "scale": kind.dim**-0.5}
    want = twin(q, k, v, **options)
    got = chunk_attention(q, k, v, by=by, **options).float()
    found = float((got - want).norm() / want.norm())
    if not found < MAX_ERROR:
        raise ArithmeticError(f"{by} differs from the fp32 twin by {found:.3g}; not timed")
    return found


def times(call: Callable[[], object], device: torch.device) -> list[float]:
    """Milliseconds of some runs, each after the caches were flushed; the first is left out."""
    found = []
    on_gpu = device.type == "cuda"
    flushed = torch.empty(FLUSHED_BYTES if on_gpu else 1, dtype=torch.uint8, device=device)
    for _ in range(1 + REPEATS):
        flushed.zero_()
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
    return found[1:]


def measure(
    geometry: ModelGeometry, kind: ChunkKind, keys: Sequence[int], queries: Sequence[int]
) -> Iterator[AttentionRow]:
    """Time every backend on every case; raises what `error` does."""
    errors = {name: error(name, geometry, kind) for name in backends(kind)}
    for num_keys, num_queries in cases(keys, queries):
        q, k, v = draw(num_keys, num_queries, geometry, kind)
        spans = ChunkSpans.of([num_queries], [num_keys], kind.device)
        work = operations(num_keys, num_queries, geometry.num_q_heads, kind.dim)
        for name in errors:
            if name == "sdpa" and num_keys >= SLOW_FROM and kind.device.type == "cuda":
                continue
            options = {"spans": spans, "scale": kind.dim**-0.5, "by": name}
            found = times(lambda: chunk_attention(q, k, v, **options), kind.device)  # noqa: B023
            ms = statistics.median(found)
            yield AttentionRow(
                name,
                num_keys,
                num_queries,
                ms,
                min(found),
                max(found),
                work / ms / 1e9,
                errors[name],
            )
