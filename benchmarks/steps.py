"""`spectral-paged bench steps`: where the time of a decode step goes.

Every sequence of a step has one new token. Contexts are made up (see `throughput.filling`), and few
blocks fall due while steps are counted. The floor of a step is the time to read every weight once
at the bandwidth of a device copy. The profiler traces kernels in other steps than those timed:

    step  [ copy of inputs | graph: products, attention, the rest | sampling ] wait [ ...

The operations between the products run compiled, as transformers writes them, or with
liger-kernel's norms, rotary embedding and activation (Hsu et al., arXiv:2410.10989), all in CUDA
graphs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from spectral_paged.benchmarks.decode.run import copy_bandwidth
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, model_label, write_result
from spectral_paged.benchmarks.throughput.backends import engine_of, forget
from spectral_paged.benchmarks.throughput.filling import fill_instead_of_prefill
from spectral_paged.benchmarks.throughput.random_models import load_either
from spectral_paged.device import choose_dtype
from spectral_paged.errors import CapacityError, InvalidRequestError
from spectral_paged.llm import LLM
from spectral_paged.models.attention_choice import use_attention
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.stored_tensors import stored_bytes
from spectral_paged.pages import PRESETS
from spectral_paged.sampling import SamplingParams

LAYERS = ("compiled", "eager", "liger")  # ways to run the operations between the products
FORMATS = ("exact", "spectral-quality")
WARM, TIMED, TRACED = 6, 32, 10  # steps
ROOM = 96  # most tokens that a sequence grows by: in steps, and while others are filled
GRAPH_GAP_US = 5.0  # kernels of a graph follow each other faster than the host can launch
MAX_ERROR = 0.1  # of logits, relative: bf16 in another order is 0.06 off after 32 random layers
KINDS = (  # the first that a kernel's name matches
    ("attention", r"^_(append|copy|exact|project|attend|reduce|apply)_kernel"),
    ("seal", r"^_(quantize|rebuild|jacobi)_kernel"),
    ("products", r"gemm|nvjet|cutlass|xmma|gemv|splitK|cublas"),
    ("copies", r"^Mem(cpy|set)"),
    ("rest", r""),
)

Span = tuple[float, float]  # microseconds from, to


@dataclass(frozen=True, slots=True)
class Row:
    """The measurement of one step: milliseconds, and shares of the traced time.

    idle_share: the share in which the GPU is idle.
    idle_between_steps_share: the same, in gaps longer than those between kernels of a graph.
    pages_sealed: pages sealed in the timed steps.
    kernels_per_step: kernels, copies and fills.
    kinds: milliseconds of kernels by kind; kernels that overlap count each.
    """

    format: str
    layers: str
    batch: int
    context: int
    step_ms: float
    floor_ms: float
    over_floor: float
    tokens_per_second: float
    idle_share: float
    idle_between_steps_share: float
    kernels_per_step: float
    kinds: dict[str, float]
    pages_sealed: int
    stats: dict[str, object]


def kind_of(kernel: str) -> str:
    """The kind, one of `KINDS`, of a kernel by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel))


def gaps(spans: Sequence[Span]) -> list[float]:
    """Lengths in microseconds of the gaps that no span covers."""
    found, until = [], None
    for begin, end in sorted(spans):
        if until is not None and begin > until:
            found.append(begin - until)
        until = end if until is None else max(until, end)
    return found


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads whole, so without an untied embedding table."""
    looked_up = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is looked_up
    return stored_bytes(model) - (0 if tied else looked_up.nbytes)


@torch.inference_mode()
def with_liger(model: Any) -> None:
    """Replace norms, rotary embedding and activations of a model by liger-kernel's.

    Raises:
        InvalidRequestError: liger-kernel has no such family, or is not installed.
        ArithmeticError: the logits differ by more than `MAX_ERROR`.
    """
    family = model.config.model_type
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as cause:
        raise InvalidRequestError(f"--layers liger: {cause}; pip install liger-kernel") from cause
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    if apply is None:
        raise InvalidRequestError(f"--layers liger: liger-kernel has no {family}")
    ids = torch.arange(3, 67, device=model.device)[None]
    with use_attention(model, "sdpa"):
        before = model(input_ids=ids, use_cache=False).logits.float()
        apply(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
        after = model(input_ids=ids, use_cache=False).logits.float()
    change = float((after - before).norm() / before.norm())
    if not change < MAX_ERROR:
        raise ArithmeticError(f"liger-kernel changes logits by {change:.3g}; not timed")


def _decoding(llm: LLM, batch: int, context: int) -> None:
    """Add `batch` requests of `context` tokens and step until all of them decode."""
    params = SamplingParams(temperature=0.0, max_tokens=ROOM, ignore_eos=True)
    for i in range(batch):
        prompt = [3 + (i + j) % 97 for j in range(context)]
        llm.engine.add_request(f"{context}/{i}", prompt, params)
    started: set[str] = set()
    while len(started) < batch:
        for output in llm.engine.step():
            if output.error is not None:
                raise output.error
            if output.outputs[0].token_ids:
                started.add(output.request_id)


def _counts(llm: LLM) -> tuple[int, int]:
    """Tokens generated and pages sealed so far."""
    stats: dict[str, Any] = llm.stats()
    return stats["generated_tokens"], stats["pages_sealed"]


def _steps(llm: LLM, count: int) -> None:
    for _ in range(count):
        llm.engine.step()


def _seconds(llm: LLM, count: int) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    _steps(llm, count)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _trace(llm: LLM, count: int) -> list[tuple[str, Span]]:
    """Name and span of every kernel and copy in `count` steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _steps(llm, count)
        torch.cuda.synchronize()
    return [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profile.events()
        if event.device_type.name == "CUDA"
    ]


def measure(
    loaded: LoadedModel,
    format: str,
    layers: str,
    batch: int,
    context: int,
    bandwidth: float,
    **options: Any,
) -> Row:
    """Time and trace steps of one engine.

    Args:
        bandwidth: bytes a second of a device copy.
        options: further arguments of `LLM`.

    Raises:
        CapacityError: not all of the sequences decoded in every step, timed or traced.
    """
    forget(loaded.model.device)
    options = {
        "max_num_seqs": batch,
        "max_model_len": context + ROOM + 1,
        "enable_prefix_caching": False,
        "compile_layers": layers == "compiled",
    } | options
    with engine_of(loaded, format, options) as llm:
        fill_instead_of_prefill(llm.engine, loaded.geometry.vocab_size)
        _decoding(llm, batch, context)
        _steps(llm, WARM)
        made, sealed = _counts(llm)
        seconds = _seconds(llm, TIMED)
        sealed = _counts(llm)[1] - sealed
        events = _trace(llm, TRACED)
        made = _counts(llm)[0] - made
        if made != (TIMED + TRACED) * batch:
            raise CapacityError(
                f"{format}: {batch} x {context} tokens did not all decode in every step ({made} of "
                f"{(TIMED + TRACED) * batch} tokens): take fewer or shorter ones, or a larger cache"
            )
        stats = llm.stats()
    spans = [span for _, span in events]
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    idle = gaps(spans)
    kinds = dict.fromkeys((kind for kind, _ in KINDS), 0.0)
    for name, (begin, end) in events:
        kinds[kind_of(name)] += (end - begin) / 1e3 / TRACED
    step, floor = seconds / TIMED, weight_bytes(loaded.model) / bandwidth
    return Row(
        format,
        layers,
        batch,
        context,
        step_ms=1e3 * step,
        floor_ms=1e3 * floor,
        over_floor=step / floor,
        tokens_per_second=batch / step,
        idle_share=sum(idle) / whole,
        idle_between_steps_share=sum(gap for gap in idle if gap > GRAPH_GAP_US) / whole,
        kernels_per_step=len(events) / TRACED,
        kinds=kinds,
        pages_sealed=sealed,
        stats={key: stats[key] for key in ("backend", "model_step", "pages_attended")},
    )


def line(row: Row) -> str:
    """The text of a row on the terminal."""
    kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row.kinds.items() if ms)
    return (
        f"{row.format:18} {row.layers:8} {row.batch:3} x {row.context:6}: {row.step_ms:7.2f} ms "
        f"({row.over_floor:.2f} of {row.floor_ms:.2f}), idle {100 * row.idle_share:.1f} % "
        f"({100 * row.idle_between_steps_share:.1f} % between steps); {kinds}"
    )


def main(
    *,
    model: str,
    formats: Sequence[str],
    layers: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    name: str,
    output_dir: Path,
    **options: Any,
) -> int:
    """Measure on this machine's GPU, print a line a row and write `steps-<model>.json`.

    Raises:
        InvalidRequestError: an unknown value of `layers` or `formats`, or see `with_liger`.
        CapacityError: see `measure`.
    """
    for option, given, known in (
        ("layers", layers, LAYERS),
        ("format", formats, ("auto", *PRESETS)),
    ):
        if unknown := [one for one in given if one not in known]:
            raise InvalidRequestError(f"--{option} {', '.join(unknown)}: use {', '.join(known)}")
    device = torch.device("cuda")
    loaded = load_either(model, device=device, dtype=choose_dtype("auto", device))
    bandwidth = copy_bandwidth()
    rows: list[Row] = []
    output_dir.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    result = {
        "environment": environment() | {"device": "cuda", "dtype": str(loaded.model.dtype)},
        "model": model_label(model),
        "copy_bytes_per_second": bandwidth,
        "weight_bytes": weight_bytes(loaded.model),
    }
    # liger-kernel's layers come last, because a model's own cannot be restored
    for how in sorted(set(layers), key=LAYERS.index):
        if how == "liger":
            with_liger(loaded.model)
        for format, context, batch in product(formats, contexts, batches):
            rows.append(measure(loaded, format, how, batch, context, bandwidth, **options))
            print(line(rows[-1]), flush=True)
            found = result | {"rows": [asdict(row) for row in rows]}
            path = write_result(output_dir, f"steps-{name or file_stem(model)}", found)
    print(f"raw results: {path}")
    return 0
