"""`spectral-paged bench store`: prompts that come back from host memory and disk, and the price."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import write_result
from spectral_paged.benchmarks.store import first_token, workloads
from spectral_paged.benchmarks.store.disk_speed import measure_disk
from spectral_paged.benchmarks.store.engines import Bench
from spectral_paged.benchmarks.store.report import draw, summary
from spectral_paged.benchmarks.store.sizes import SUITES
from spectral_paged.benchmarks.throughput.random_models import load_either
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import InvalidRequestError
from spectral_paged.options import LLMOptions

PARTS: dict[str, Callable[[Bench], Iterator[Any]]] = {
    "ttft": first_token.measure,
    "turns": workloads.measure_turns,
    "documents": workloads.measure_documents,
    "nohit": workloads.measure_nohit,
    "vllm": workloads.measure_turns_in_vllm,
}
USUAL = ("ttft", "turns", "documents", "nohit")


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments of `bench store`.

    only: parts to run; none: all but vLLM's.
    kv_store: where folders of records are made, on the disk that is measured; None: with other
        temporary files.
    num_conversations: in place of the suite's.
    """

    suite: str
    only: Sequence[str] = ()
    kv_format: str = "auto"
    device: str = LLMOptions.device
    dtype: str | torch.dtype = LLMOptions.dtype
    kv_store: Path | None = None
    num_conversations: int | None = None
    output_dir: Path = Path("benchmarks/results")


def main(o: Options) -> int:
    """Measure the parts of a suite, and write a result and a plot for each.

    Raises:
        InvalidRequestError: no such suite or part.
        ArithmeticError: prompts that came back have other answers than those that were computed.
        MissingPackageError: vLLM is asked for and not there.
    """
    if o.suite not in SUITES:
        raise InvalidRequestError(f"--suite {o.suite!r}: use {', '.join(SUITES)}")
    if unknown := [one for one in o.only if one not in PARTS]:
        raise InvalidRequestError(f"--only {', '.join(unknown)}: use {', '.join(PARTS)}")
    sizes = SUITES[o.suite]
    if o.num_conversations is not None:
        sizes = replace(sizes, num_conversations=o.num_conversations)
    parts = list(dict.fromkeys(o.only or USUAL))
    where = choose_device(o.device)
    dtype = choose_dtype(o.dtype, where)
    for path in filter(None, (o.output_dir, o.kv_store)):  # fails before the work, not after it
        path.mkdir(parents=True, exist_ok=True)
    # vLLM makes weights of its own
    device = torch.device("meta") if parts == ["vllm"] else where
    loaded = load_either(sizes.model, device=device, dtype=dtype)
    for part in parts:
        with tempfile.TemporaryDirectory(dir=o.kv_store) as folder:
            bench = Bench(loaded, o.kv_format, sizes, Path(folder))
            rows: list[dict[str, Any]] = []
            result: dict[str, Any] = {
                "environment": environment() | {"device": where.type, "dtype": str(dtype)},
                "suite": o.suite,
                "part": part,
                "kv_format": o.kv_format,
                "sizes": asdict(sizes),
                "disk": asdict(measure_disk(bench.folder, sizes.probe_bytes)),
                "rows": rows,
            }
            stem = f"store-{o.suite}-{part}"
            for row in PARTS[part](bench):
                rows.append({"kind": type(row).__name__} | asdict(row))
                result["ties"] = bench.ties
                path = write_result(o.output_dir, stem, result)
        print(f"-- {part}\n{summary(result)}\nraw results: {path}", flush=True)
        print(draw(result, o.output_dir / f"{stem}.png"), flush=True)
    return 0
