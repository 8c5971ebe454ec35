"""`spectral-paged bench capacity`: how much context a memory holds, by format.

The prediction is arithmetic over slabs. The measurement stores sequences with made-up K and V until
one more does not fit, and reads the allocator's count. Speed and quality are not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, model_label, write_result
from spectral_paged.benchmarks.throughput.random_models import is_random, random_config
from spectral_paged.cache import SpectralKVCache
from spectral_paged.conformance.inputs import MadeUpTokens, toy_basis
from spectral_paged.device import choose_device
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import load_config
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable

FORMATS = (
    "exact",
    "spectral-quality",
    "spectral-compact",
    "spectral-page",
    "spectral-int8",
    "spectral-int8-post",
)
DTYPE = torch.bfloat16
STEP_TOKENS = 1024


@dataclass(frozen=True)
class Row:
    """The capacity of one format.

    Tokens are those of sealed contexts; sequences have `context` tokens each."""

    format: str
    fingerprint: str
    bytes_per_token: float
    capacity_tokens: int
    predicted_sequences: int
    stored_sequences: int
    allocated_bytes: int  # arenas, and all else that the cache allocates
    peak_bytes: int | None  # while storing and sealing; None without a GPU


def store(tokens: MadeUpTokens, name: str, num_tokens: int) -> bool:
    """Store a sequence in steps of at most `STEP_TOKENS`; False if it did not fit and is freed."""
    cache = tokens.cache
    if cache.add_sequence(name, num_prompt_tokens=num_tokens) is None:
        return False
    while cache.num_tokens(name) < num_tokens:
        left = num_tokens - cache.num_tokens(name)
        count = min(left, cache.chunk_limit(name), STEP_TOKENS)
        plan = cache.reserve({name: count})
        if plan is None:
            cache.free(name)
            return False
        cache.begin_step(plan)
        tokens.append(count)
        cache.end_step()
    return True


def measure(
    name: str,
    geometry: ModelGeometry,
    context: int,
    memory: int,
    max_num_seqs: int,
    device: torch.device,
) -> Row:
    """Fill a cache of `memory` bytes with sequences of `context` tokens until no more fits."""
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    format = PageFormat.preset(name, num_kv_heads=heads, head_dim=dim)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    cache = SpectralKVCache(
        num_layers=geometry.num_layers,
        num_q_heads=geometry.num_q_heads,
        num_kv_heads=heads,
        head_dim=dim,
        rope=RotaryTable.from_theta(5e5, dim, max_positions=context + 64, device=device),
        sliding_windows=geometry.windows,
        format=format,
        device=device,
        dtype=DTYPE,
        kv_cache_bytes=memory,
        max_num_seqs=max_num_seqs,
        calibration=(
            toy_basis(format, num_layers=geometry.num_layers) if format.needs_calibration else None
        ),
        enable_prefix_caching=False,
    )
    allocated = torch.cuda.memory_allocated(device) - before if cuda else 0
    tokens, stored = MadeUpTokens(cache), 0
    while stored < max_num_seqs and store(tokens, str(stored), context):
        stored += 1
    if cuda:
        torch.cuda.synchronize(device)
    stats = cache.stats()
    bytes_per_token = stats["bytes_per_token"]
    assert isinstance(bytes_per_token, float)
    return Row(
        name,
        cache.format.fingerprint,
        bytes_per_token,
        cache.capacity_tokens,
        min(cache.concurrency(context), max_num_seqs),
        stored,
        allocated or cache.num_bytes,
        torch.cuda.max_memory_allocated(device) - before if cuda else None,
    )


def main(
    *,
    model: str,
    device: str,
    context: int,
    memory: int,
    max_num_seqs: int,
    formats: Sequence[str],
    output_dir: Path,
) -> int:
    """Measure, print a table and write `capacity-<model>.json`.

    Raises:
        InvalidRequestError: `context` is longer than the model takes.
    """
    where = choose_device(device)
    config = random_config(model) if is_random(model) else load_config(model)
    geometry = ModelGeometry.from_config(config)
    if not 1 <= context <= geometry.max_position_embeddings:
        raise InvalidRequestError(
            f"--context is {context}; this model takes 1 to {geometry.max_position_embeddings}"
        )
    print(
        f"{model}: {memory / 1e9:.2f} GB of cache, sequences of {context} tokens, at most "
        f"{max_num_seqs}"
    )
    rows = []
    for name in formats or FORMATS:
        rows.append(measure(name, geometry, context, memory, max_num_seqs, where))
        row, base = rows[-1], rows[0]
        print(
            f"{row.format:20} {row.bytes_per_token:9.0f} bytes/token  {row.capacity_tokens:9} "
            f"tokens ({row.capacity_tokens / base.capacity_tokens:5.2f}x)  sequences: predicted "
            f"{row.predicted_sequences:4}, stored {row.stored_sequences:4} "
            f"({row.stored_sequences / max(base.stored_sequences, 1):5.2f}x)  "
            f"{row.allocated_bytes / 1e9:.2f} GB allocated",
            flush=True,
        )
    result = {
        "environment": environment() | {"device": where.type},
        "model": model_label(model),
        "context": context,
        "kv_cache_bytes": memory,
        "max_num_seqs": max_num_seqs,
        "rows": [asdict(row) for row in rows],
    }
    path = write_result(output_dir, f"capacity-{file_stem(model)}", result)
    print(f"raw results: {path}")
    return 0
