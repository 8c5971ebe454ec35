"""`spectral-paged bench tune`: the fastest launch of the kernels on this GPU.

The search starts at the table's entry and tries candidates one field at a time, by the geometric
mean over workloads. It writes the table that kernels read (`kernels/launch/configs.json`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch

from spectral_paged.benchmarks.decode.run import ROPE_THETA, Workload, formats_of, graph_ms
from spectral_paged.benchmarks.seal import Blocks
from spectral_paged.kernels.launch.configs import (
    TABLE,
    DecodeConfig,
    SealConfig,
    case_of,
    decode_config,
    gpus_of,
    seal_config,
)
from spectral_paged.kernels.seal.triton.seal import seal
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable

WORK = ((64, 16384), (32, 8192), (1, 32768))
# (shape, preset) of each case
CASES = (
    ("llama-3-8b", "spectral-quality"),
    ("llama-3-8b", "spectral-int8"),
    ("llama-3-8b", "spectral-int8-post"),
    ("mha-64", "spectral-quality"),
)
DECODE_CANDIDATES: dict[str, Sequence[int | None]] = {
    "attend_registers": (None, 128, 112, 96),
    "project_registers": (None, 208, 168, 128),
    "apply_registers": (None, 128, 112, 96),
    "splits": (1, 2, 4, 6),
    "project_programs": (264, 396, 792),
    "programs": (528, 792, 1056, 1584),
    "second_stream": (False, True),
}
SEAL_CANDIDATES: dict[str, Sequence[int | None]] = {"warps": (4, 8), "rows": (32, 64)}
NOISE = 0.99  # a candidate must take less than this share of the best time to replace it


C = TypeVar("C", DecodeConfig, SealConfig)


def best(config: C, candidates: dict[str, Sequence[int | None]], cost: Callable[[C], float]) -> C:
    """The config of least cost (ms), found by changing one field after the other."""
    least = cost(config)
    for name, values in candidates.items():
        for value in values:
            if value == getattr(config, name):
                continue
            other = replace(config, **{name: value})  # type: ignore[arg-type]
            took = cost(other)
            print(f"  {other}: {took:.4f} ms", flush=True)
            if took < NOISE * least:
                config, least = other, took
    return config


def tune_decode(shape: str, preset: str) -> tuple[str, DecodeConfig]:
    """The case and the fastest launch of `decode_attention` for it."""
    format = formats_of(shape, [preset])[0]
    rope = RotaryTable.from_theta(ROPE_THETA, format.head_dim, max_positions=40_000, device="cuda")
    ops = [
        Workload(shape, [length] * batch, "", 1.0).attend_op(format, rope)[0]
        for batch, length in WORK
    ]

    def cost(config: DecodeConfig) -> float:
        times = [graph_ms(lambda op=op: op(config)) for op in ops]  # type: ignore[misc]
        return math.exp(sum(map(math.log, times)) / len(times))

    candidates = dict(DECODE_CANDIDATES)
    unused = ("apply_registers", "splits") if format.basis == "shared" else ("project_programs",)
    for name in unused:
        del candidates[name]
    print(f"decode {shape} {preset}", flush=True)
    start = decode_config(format.layout, torch.device("cuda"))
    return case_of(format.layout), best(start, candidates, cost)


def tune_seal() -> tuple[str, SealConfig]:
    """The case and the fastest launch of `seal` for it, over eight blocks of an 8B shape."""
    device = torch.device("cuda")
    format = PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128)
    blocks = Blocks(format, 8, device)

    def cost(config: SealConfig) -> float:
        return graph_ms(blocks.kernel(seal, config=config), replays=5)

    print("seal", flush=True)
    start = seal_config(format.layout, device)
    return case_of(format.layout), best(start, SEAL_CANDIDATES, cost)


def changed(config: DecodeConfig | SealConfig) -> dict[str, Any]:
    """The fields of `config` that differ from the default."""
    plain = asdict(type(config)())
    return {name: value for name, value in asdict(config).items() if value != plain[name]}


def main(*, output: Path | None) -> int:
    """Measure, and write this GPU's entries to the table `output`, by default the package's."""
    path = output or Path(str(files("spectral_paged.kernels.launch") / TABLE))
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found: dict[str, dict[str, Any]] = {"decode": {}, "seal": {}}
    for shape, preset in CASES:
        case, decode = tune_decode(shape, preset)
        found["decode"][case] = changed(decode)
        torch.cuda.empty_cache()
    case, seal = tune_seal()
    found["seal"][case] = changed(seal)
    mine = table.setdefault(gpus_of(torch.device("cuda"))[0], {})
    for op, cases in found.items():  # cases that were not measured keep their entry
        mine.setdefault(op, {}).update(cases)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    print(f"written to {path}")
    return 0
