"""`spectral-paged bench served`: needles and divergence through whole engines, side by side.

`bench quality` judges formats on a replay of one model, many at once. This asks engines as their
users do: prompts are computed through pages, by segments, with the engine's own kernels and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from spectral_paged.benchmarks.quality.tasks import Haystack
from spectral_paged.benchmarks.quality.texts import judged_texts
from spectral_paged.benchmarks.results_io.environment import environment
from spectral_paged.benchmarks.results_io.result_file import file_stem, model_label, write_result
from spectral_paged.benchmarks.served.answers import Answers, ask, compared
from spectral_paged.benchmarks.served.requests import Request, requests
from spectral_paged.benchmarks.throughput.backends import engine_of, off_the_gpu
from spectral_paged.benchmarks.throughput.random_models import is_random
from spectral_paged.benchmarks.throughput.vllm_server import VLLMServer, is_vllm
from spectral_paged.device import choose_device, choose_dtype
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.loader import LoadedModel, load_model
from spectral_paged.options import DEFAULT_MODEL, LLMOptions
from spectral_paged.sampling import SamplingParams

BACKENDS = ("exact", "auto")


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments of `bench served`.

    backends: presets of this engine, or names of `VLLMServer`; divergences are from the first.
    lengths: tokens of a context.
    needles, windows, places: as of `requests`.
    """

    model: str = DEFAULT_MODEL
    backends: Sequence[str] = BACKENDS
    lengths: Sequence[int] = (2048,)
    needles: int = 32
    windows: int = 8
    places: int = 16
    device: str = LLMOptions.device
    dtype: str | torch.dtype = LLMOptions.dtype
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = LLMOptions.gpu_memory_utilization
    max_num_seqs: int = 16
    name: str = ""
    output_dir: Path = field(default_factory=lambda: Path("benchmarks/results"))


def serve(loaded: LoadedModel, backend: str, asked: Sequence[Request], o: Options) -> Answers:
    """The answers of one backend."""
    options: dict[str, Any] = {
        "max_num_seqs": o.max_num_seqs,
        "kv_cache_bytes": o.kv_cache_bytes,
        "gpu_memory_utilization": o.gpu_memory_utilization,
        "max_model_len": max(len(r.prompt_token_ids) + r.num_answer_tokens for r in asked),
        "enable_prefix_caching": True,
    }
    if is_vllm(backend):
        with off_the_gpu(loaded):
            return _serve_with_vllm(VLLMServer(backend, loaded, LLMOptions(**options)), asked)
    llm = engine_of(loaded, backend, options)
    try:
        return Answers(backend, ask(llm, SamplingParams, asked), llm.stats())
    finally:
        llm.close()


def _serve_with_vllm(server: VLLMServer, asked: Sequence[Request]) -> Answers:
    from vllm import SamplingParams as Params

    try:
        return Answers(server.backend, ask(server.llm, Params, asked), server.stats())
    finally:
        server.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = "| engine and cache | context | needles | KL | +- |\n| --- | --- | --- | --- | --- |\n"

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.5f}"

    return head + "\n".join(
        f"| {r['backend']} | {r['length']} | {r['recalled']}/{r['needles']} | {cell(r['kl'])} "
        f"| {cell(r['kl_standard_error'])} |"
        for r in rows
    )


def main(o: Options) -> int:
    """Ask all backends, print a table and write `served-<model>.json`.

    Raises:
        InvalidRequestError: no backend, a model of random weights, or none with a tokenizer; a
            length beyond the model's.
    """
    if not o.backends:
        raise InvalidRequestError("no --backend: give a preset, exact, vllm or vllm-pages")
    if is_random(o.model):
        raise InvalidRequestError(f"{o.model} knows no facts: give --model one with weights")
    device = choose_device(o.device)
    dtype = choose_dtype(o.dtype, device)
    if all(map(is_vllm, o.backends)):  # vLLM loads weights of its own
        device = torch.device("cpu")
    loaded = load_model(o.model, device=device, dtype=dtype)
    if loaded.tokenizer is None:
        raise InvalidRequestError(f"model {loaded.name!r} has no tokenizer to read texts with")
    hay = Haystack(judged_texts(()), loaded.tokenizer, loaded.geometry.max_position_embeddings)
    asked = requests(hay, o.lengths, needles=o.needles, windows=o.windows, places=o.places)
    given = asdict(o) | {"output_dir": None, "model": model_label(o.model), "dtype": str(dtype)}
    rows: list[dict[str, Any]] = []
    stats: dict[str, Any] = {}
    result = {
        "environment": environment(),
        "options": given,
        "baseline": o.backends[0],
        "rows": rows,
        "stats": stats,
    }
    baseline: Answers | None = None
    for backend in dict.fromkeys(o.backends):
        answers = serve(loaded, backend, asked, o)
        baseline = baseline or answers
        rows += compared(asked, answers, baseline, loaded.tokenizer)
        stats[backend] = answers.stats
        print(f"{backend}: {len(asked)} requests answered", flush=True)
        path = write_result(o.output_dir, f"served-{o.name or file_stem(o.model)}", result)
    print(table(rows), f"raw results: {path}", sep="\n")
    return 0
