"""`spectral-paged bench host`: what a decode step costs the host, without a model.

The engine schedules, opens and closes steps of a real cache, and samples; the model's forward is
left out, and so is attention. What is left is what a small model waits for:

    schedule | slots, places, tables | inputs | [ no model ] | sampling | tokens of the step before

Seconds are those of the thread, so other processes do not count. Tensor operations are launches or
copies on a GPU, 5 to 10 us each, and nearly nothing on a CPU, where they have little to compute.
Prompts have any length from `SHORTEST` to `LONGEST`, so that blocks fall due in different steps.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import write_result
from spectral_paged.benchmarks.throughput.filling import copy_where_no_kernel_seals
from spectral_paged.cache import SpectralKVCache, StepPlan
from spectral_paged.conformance.inputs import toy_basis
from spectral_paged.device import choose_device
from spectral_paged.engine import Engine
from spectral_paged.models.static_inputs import StaticInputs
from spectral_paged.outputs import RequestOutputKind
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable
from spectral_paged.sampling import LogitsVisitor, PendingTokens, SamplingParams
from spectral_paged.scheduler import SchedulerConfig

FORMATS, BATCHES = ("exact", "spectral-quality"), (1, 64, 256)
SHORTEST, LONGEST, ROOM = 1024, 3072, 256  # tokens of a prompt, and of its output
WARM, TIMED, COUNTED = 8, 128, 16  # steps
VOCAB, HEAD_DIM = 64, 64
VIEWS = ("aten.slice", "aten.select", "aten.view", "aten.detach", "aten.unsqueeze", "aten.alias")


@dataclass(frozen=True, slots=True)
class Row:
    """The host's time of a step, in microseconds of its thread, and its tensor operations.

    outputs: what the engine tells of requests: all of them in every step, or each at its end.
    """

    format: str
    batch: int
    outputs: str
    median_us: float
    mean_us: float
    ops: float


class NoModel:
    """A runner whose model is nothing: inputs are copied to where graphs read them."""

    def __init__(self, cache: SpectralKVCache) -> None:
        self._inputs = StaticInputs(cache)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(cache.max_num_seqs, VOCAB, generator=generator)
        self._logits = logits.to(cache.device)

    def forward(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
        pending: PendingTokens | None = None,
        visitor: LogitsVisitor | None = None,
        adapters: Sequence[int] | None = None,
    ) -> Tensor:
        if plan.is_decode:
            self._inputs.fill(token_ids, plan.starts, pending)
        return self._logits[: len(logit_rows)]

    def sleep(self) -> None:
        pass

    def wake_up(self) -> None:
        pass

    def stats(self) -> dict[str, object]:
        return {}


class Operations(TorchDispatchMode):
    """Counts tensor operations, without those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not str(func).startswith(VIEWS)
        return func(*args, **(kwargs or {}))


def decoding(
    format: str, batch: int, device: torch.device, kind: RequestOutputKind, **params: Any
) -> Engine:
    """An engine without a model in which `batch` requests decode.

    Args:
        params: sampling parameters of all requests besides their length.
    """
    chosen = PageFormat.preset(format, num_kv_heads=1, head_dim=HEAD_DIM)
    longest = LONGEST + ROOM
    pages = -(-longest // 64) * batch + 64
    cache = SpectralKVCache(
        num_layers=1,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        rope=RotaryTable.from_theta(1e4, HEAD_DIM, max_positions=longest).to(device),
        format=chosen,
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        kv_cache_bytes=2 * pages * chosen.exact_page_bytes(4),
        max_num_seqs=batch,
        max_model_len=longest,
        calibration=toy_basis(chosen, num_layers=1) if chosen.needs_calibration else None,
    )
    copy_where_no_kernel_seals(cache)
    engine = Engine(
        NoModel(cache),
        cache,
        scheduler_config=SchedulerConfig(batch, batch * LONGEST, 64),
        eos_token_ids=[0],
        vocab_size=VOCAB,
        async_scheduling=True,
    )
    lengths = random.Random(0)
    asked = {"temperature": 0.0, "max_tokens": ROOM, "ignore_eos": True} | params
    for i in range(batch):
        prompt = [1 + (i + j) % (VOCAB - 1) for j in range(lengths.randint(SHORTEST, LONGEST))]
        engine.add_request(str(i), prompt, SamplingParams(output_kind=kind, **asked))
    while not all(c.generated for g in engine.requests.by_id.values() for c in g.completions):
        engine.step()
    return engine


@torch.inference_mode()
def measure(format: str, batch: int, kind: RequestOutputKind, device: torch.device) -> Row:
    """Time and count steps in which `batch` sequences decode."""
    engine = decoding(format, batch, device, kind)
    for _ in range(WARM):
        engine.step()
    seconds = []
    for _ in range(TIMED):
        begin = time.thread_time()
        engine.step()
        seconds.append(time.thread_time() - begin)
    with Operations() as operations:
        for _ in range(COUNTED):
            engine.step()
    return Row(
        format,
        batch,
        kind.name.lower(),
        median_us=1e6 * statistics.median(seconds),
        mean_us=1e6 * statistics.fmean(seconds),
        ops=operations.count / COUNTED,
    )


def line(row: Row) -> str:
    """The text of a row on the terminal."""
    return (
        f"{row.format:18} {row.batch:4} sequences, outputs {row.outputs:10}: median "
        f"{row.median_us:6.0f} us a step, mean {row.mean_us:6.0f}, {row.ops:5.1f} operations"
    )


def main(
    *,
    formats: Sequence[str],
    batches: Sequence[int],
    device: str,
    name: str,
    output_dir: Path,
) -> int:
    """Measure on this machine, print a line a row and write `host-<device>.json`.

    Raises:
        InvalidRequestError: there is no such device.
        FormatError: an unknown format.
    """
    where = choose_device(device)
    kinds = RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE
    rows: list[Row] = []
    for format, batch, kind in product(formats, batches, kinds):
        rows.append(measure(format, batch, kind, where))
        print(line(rows[-1]), flush=True)
    found = {"environment": environment() | {"device": str(where)}, "rows": list(map(asdict, rows))}
    path = write_result(output_dir, f"host-{name or where.type}", found)
    print(f"raw results: {path}")
    return 0
