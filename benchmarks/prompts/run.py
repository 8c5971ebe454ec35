"""`spectral-paged bench prompts`: how fast prompts are computed, and by whose attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spectral_paged.benchmarks.prompts import attention, engine
from spectral_paged.benchmarks.prompts.attention import AttentionRow, CopyRow
from spectral_paged.benchmarks.prompts.engine import EngineRow
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, model_label, write_result
from spectral_paged.benchmarks.results_io.text_table import table
from spectral_paged.benchmarks.throughput.random_models import load_either
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import InvalidRequestError
from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.chunk.gpu import BACKENDS
from spectral_paged.pages import PRESETS


def attention_table(rows: Sequence[AttentionRow], copies: Sequence[CopyRow]) -> str:
    """Milliseconds and TFLOP/s, a line a case, a column a backend, and the copy of stored keys."""
    copied = {row.keys: f"{row.ms:.3f}" for row in copies}
    names = list(dict.fromkeys(row.backend for row in rows))
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for row in rows:
        text = f"{row.ms:.3f} ({row.tflops_per_second:.0f})"
        cells.setdefault((row.keys, row.queries), {})[row.backend] = text
    lines = [
        [f"{keys:,}", "fresh" if keys == queries else f"{queries:,}"]
        + [found.get(name, "-") for name in names]
        + ["-" if keys == queries else copied[keys]]
        for (keys, queries), found in cells.items()
    ]
    columns = [f"{name} ms (TFLOP/s)" for name in names]
    return table([["keys", "queries", *columns, "copy ms"], *lines])


def engine_table(rows: Sequence[EngineRow]) -> str:
    """Prompt tokens a second, a line a run."""
    heading = ["format", "segment", "prompts", "step", "tokens/s", "sealing", "attention"]
    lines = [
        [
            row.format,
            f"{row.segment:,}" if row.segment else "-",
            f"{row.num_prompts} x {row.input_len:,}",
            f"{row.budget:,}",
            f"{row.tokens_per_second:,.0f}",
            f"{100 * row.seal_seconds / row.seconds:.1f} %",
            row.prefill_backend,
        ]
        for row in rows
    ]
    return table([heading, *lines])


def main(
    *,
    model: str,
    device: str,
    dtype: str,
    keys: Sequence[int],
    queries: Sequence[int],
    formats: Sequence[str],
    segments: Sequence[int],
    input_lens: Sequence[int],
    budgets: Sequence[int],
    num_prompts: int | None,
    attention_only: bool,
    enforce_eager: bool,
    name: str,
    output_dir: Path,
) -> int:
    """Measure, write `prompts-<model>.json` and print its tables.

    Raises:
        InvalidRequestError: an unknown format.
        ArithmeticError: a backend differs from the fp32 twin by more than its dtype explains.
    """
    if unknown := [one for one in formats if one not in ("auto", *PRESETS)]:
        raise InvalidRequestError(f"--format {', '.join(unknown)}: use {', '.join(PRESETS)}")
    where = choose_device(device)
    loaded = load_either(model, device=where, dtype=choose_dtype(dtype, where))
    geometry = loaded.geometry
    kind = ChunkKind(loaded.model.dtype, geometry.head_dim, where)
    obstacles = {name: one.obstacle(kind) for name, one in BACKENDS.items()}
    result = {
        "environment": environment() | {"device": str(where), "dtype": str(kind.dtype)},
        "model": model_label(model),
        "heads": [geometry.num_q_heads, geometry.num_kv_heads, geometry.head_dim],
        "not_here": {name: why for name, why in obstacles.items() if why is not None},
    }
    output_dir.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    alone: list[AttentionRow] = []
    whole: list[EngineRow] = []

    def write() -> Path:
        rows = {
            "attention": [asdict(x) for x in alone],
            "copies": [asdict(x) for x in copies],
            "engine": [asdict(x) for x in whole],
        }
        return write_result(output_dir, f"prompts-{name or file_stem(model)}", result | rows)

    copies = list(attention.measure_copies(geometry, kind, keys))
    for row in attention.measure(geometry, kind, keys, queries):
        alone.append(row)
    path = write()
    if not attention_only:
        for run in engine.measure(
            loaded,
            formats=formats,
            segments=segments,
            input_lens=input_lens,
            budgets=budgets,
            num_prompts=num_prompts,
            enforce_eager=enforce_eager,
        ):
            whole.append(run)
            path = write()
    print(f"raw results: {path}\n\n{attention_table(alone, copies)}")
    if whole:
        print(f"\n{engine_table(whole)}")
    return 0
