"""Attention of prompt chunks alone: every backend that this machine has, beside each other.

A chunk is fresh (it attends to itself), or the last queries of longer keys. Every backend is first
compared with the fp32 twin. Keys and values lie as the engine gives them: the model's own for fresh
chunks, heads apart for history. Where vLLM is installed, its FlashAttention 3 is timed too, of rows
and of exact pages where they lie; the time of copying those pages into rows stands beside both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spectral_paged.benchmarks.prompts import in_place
from spectral_paged.benchmarks.prompts.in_place import StoredSequence
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

Chunks = tuple[Tensor, Tensor, Tensor, ChunkSpans]  # q, k, v
Attend = Callable[[Tensor, Tensor, Tensor, ChunkSpans], Tensor]


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


@dataclass(frozen=True, slots=True)
class CopyRow:
    """The median milliseconds of copying the exact pages of so many keys into rows."""

    keys: int
    ms: float
    gigabytes_per_second: float


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


def error(attend: Attend, kind: ChunkKind, chunks: Chunks, what: str) -> float:
    """The relative error of `attend` on chunks.

    Raises:
        ArithmeticError: it is larger than half precision explains.
    """
    want = twin(*chunks[:3], spans=chunks[3], scale=kind.dim**-0.5)
    found = float((attend(*chunks).float() - want).norm() / want.norm())
    if not found < MAX_ERROR:
        raise ArithmeticError(f"{what} differs from the fp32 twin by {found:.3g}; not timed")
    return found


def errors(geometry: ModelGeometry, kind: ChunkKind) -> dict[str, float]:
    """The relative error of everything that is timed; raises as `error` does."""
    spans = ChunkSpans.of([97, 130], [257, 130], kind.device, gap=KEY_GAP)
    two = (*draw(spans.num_key_rows, spans.q_ends[-1], geometry, kind), spans)
    found = {n: error(by_name(n, kind), kind, two, n) for n in backends(kind)}
    if in_place.obstacle(kind) is None:
        one = (*draw(321, 97, geometry, kind), ChunkSpans.of([97], [321], kind.device))
        for name, attend in by_vllm(kind, one[1], one[2]).items():
            found[name] = error(attend, kind, one, name)
    return found


def by_name(name: str, kind: ChunkKind) -> Attend:
    """Attention by a backend of `chunk.gpu`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: ChunkSpans) -> Tensor:
        return chunk_attention(q, k, v, spans=spans, scale=kind.dim**-0.5, by=name)

    return attend


def by_vllm(kind: ChunkKind, k: Tensor, v: Tensor) -> dict[str, Attend]:
    """Attention by vLLM's FlashAttention 3, of rows and of the pages where k and v are stored."""
    scale, stored = kind.dim**-0.5, StoredSequence.of(k, v)

    return {
        "vllm": lambda q, k, v, spans: in_place.of_rows(q, k, v, spans, scale),
        "vllm in place": lambda q, k, v, spans: in_place.of_pages(q, stored, spans, scale),
    }


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
    """Time every backend on every case; raises as `error` does."""
    found = errors(geometry, kind)
    for num_keys, num_queries in cases(keys, queries):
        q, k, v = draw(num_keys, num_queries, geometry, kind)
        spans = ChunkSpans.of([num_queries], [num_keys], kind.device)
        work = operations(num_keys, num_queries, geometry.num_q_heads, kind.dim)
        calls = {name: by_name(name, kind) for name in backends(kind)}
        if num_keys >= SLOW_FROM and kind.device.type == "cuda":
            calls.pop("sdpa", None)
        if in_place.obstacle(kind) is None:
            calls |= by_vllm(kind, k, v)
        for name, call in calls.items():
            runs = times(partial(call, q, k, v, spans), kind.device)
            ms = statistics.median(runs)
            spread = ms, min(runs), max(runs)
            yield AttentionRow(name, num_keys, num_queries, *spread, work / ms / 1e9, found[name])


def measure_copies(
    geometry: ModelGeometry, kind: ChunkKind, keys: Sequence[int]
) -> Iterator[CopyRow]:
    """Time how exact pages are brought together for a chunk that has them as history."""
    for num_keys in keys:
        _, k, v = draw(num_keys, 1, geometry, kind)
        stored = StoredSequence.of(k, v)
        ms = statistics.median(times(stored.copied, kind.device))
        moved = 2 * (k.numel() + v.numel()) * k.element_size()  # read and written
        yield CopyRow(num_keys, ms, moved / ms / 1e6)
