"""Suites of `bench throughput`: workloads that run over one loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spectral_paged.benchmarks.throughput import run
from spectral_paged.benchmarks.throughput.run import CONTINUOUS, GENERATE, Options
from spectral_paged.benchmarks.throughput.workload import WorkloadOptions
from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.weight_quantization import NF4

MODEL_8B = "random:llama-3-8b"
FORMATS = ("exact", "spectral-quality", "spectral-int8-post", "spectral-compact")
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _decode_only(context: int, output_len: int, requests: int = 256) -> Options:
    """A workload that times decode steps over made-up contexts.

    Outputs must be so long that the first sequence still decodes when the last one is filled."""
    return Options(
        MODEL_8B,
        WorkloadOptions(num_prompts=requests, input_len=context, output_len=output_len),
        FORMATS,
        max_num_seqs=(requests,),
        max_model_len=context + 512,
        enable_prefix_caching=False,
        decode_only=True,
        fit=True,
    )


def _whole(input_len: int, output_len: int, requests: int, ratio: float = 0.0) -> Options:
    return Options(
        MODEL_8B,
        WorkloadOptions(
            num_prompts=requests, input_len=input_len, output_len=output_len, range_ratio=ratio
        ),
        ("exact", "spectral-quality"),
        max_model_len=2 * (input_len + output_len),
        enable_prefix_caching=False,
    )


MIXED = _whole(256, 1024, 64, 0.5)

# what a user of vLLM would run instead, and pages inside it; then this engine
BESIDE_VLLM = (
    "vllm",
    "vllm:fp8",
    "vllm-pages:exact",
    "vllm-pages:spectral-quality",
    "exact",
    "spectral-quality",
)


def _beside_vllm(input_len: int, output_len: int, requests: int, fit: bool = False) -> Options:
    workload = WorkloadOptions(num_prompts=requests, input_len=input_len, output_len=output_len)
    return Options(MODEL_8B, workload, BESIDE_VLLM, enable_prefix_caching=False, fit=fit)


SUITES: dict[str, dict[str, Options]] = {
    # for one H200; each backend starts once and serves all of them
    "8b-vllm": {
        "1k": _beside_vllm(1024, 256, 256),
        "8k": _beside_vllm(8192, 512, 96),
        # so many outputs that the first sequence still decodes when the last prompt is computed
        "32k-full": _beside_vllm(32_768, 512, 160, fit=True),
    },
    # for one H200: 4 bits a weight beside a cache in what a common card has left
    "8b-4bit": {
        "8k-24gb": replace(
            _decode_only(8192, 96, 128),
            backends=("exact", "spectral-quality"),
            gpu_memory_utilization=0.17,
            max_num_batched_tokens=2048,
            quantization=NF4,
        ),
    },
    # for one H200; a name is the length of context or prompt, and the limit
    "8b": {
        "32k-full": _decode_only(32_768, 192),
        # 0.17 of 141 GB are 24 GB, as a common card has
        "8k-24gb": replace(
            _decode_only(8192, 96, 64), gpu_memory_utilization=0.17, max_num_batched_tokens=2048
        ),
        "mixed": replace(
            MIXED, backends=("exact", "spectral-quality", GENERATE), max_num_seqs=(64,)
        ),
        "8k": _whole(8192, 512, 256),
        "8k-long": _whole(8192, 2048, 96),
        "1k": _whole(1024, 256, 256),
        "curve": replace(_whole(128, 96, 256), max_num_seqs=POWERS, rounds=1),
        "context": replace(
            _decode_only(32_768, 96, 16), fit=False, input_lens=(2048, 8192, 32_768)
        ),
        "continuous": replace(
            MIXED, backends=(CONTINUOUS,), kv_cache_bytes=32 << 30, max_num_seqs=(64,)
        ),
    },
}


def main(
    name: str,
    *,
    only: Sequence[str],
    backends: Sequence[str] = (),
    quantization: str | None = None,
    append: bool = False,
    output_dir: Path,
) -> int:
    """Run the workloads of a suite and write a result for each.

    Args:
        only: the workloads to run; default all.
        backends: the backends to run in place of the suite's own.
        quantization: of the weights, for all backends; default the suite's own.
        append: keep the rows of other backends of an earlier run on the same machine and commit.

    Raises:
        InvalidRequestError: no such suite or workload.
    """
    if name not in SUITES:
        raise InvalidRequestError(f"--suite {name!r}: use {', '.join(SUITES)}")
    suite = SUITES[name]
    if unknown := [one for one in only if one not in suite]:
        raise InvalidRequestError(f"--only {', '.join(unknown)}: {name} has {', '.join(suite)}")
    chosen = {one: options for one, options in suite.items() if not only or one in only}
    chosen = {
        one: replace(
            options,
            backends=backends or options.backends,
            quantization=quantization or options.quantization,
        )
        for one, options in chosen.items()
    }
    weights = "" if quantization is None else f"-{quantization}"
    loaded = run.load(next(iter(chosen.values())))
    reports = [
        run.Report(
            replace(options, name=f"{name}-{one}{weights}", append=append, output_dir=output_dir),
            loaded,
        )
        for one, options in chosen.items()
    ]
    run.measure_all(reports, loaded)
    return 0
