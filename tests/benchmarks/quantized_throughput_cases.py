"""`bench throughput` with weights in four bits, on a CPU: `make quantized`."""

from __future__ import annotations

import json

from spectral_paged.benchmarks.throughput import run
from spectral_paged.benchmarks.throughput.workload import WorkloadOptions


def test_throughput_is_measured_with_four_bits(tmp_path):
    options = run.Options(
        model="random:tiny",
        workload=WorkloadOptions(num_prompts=8, input_len=1200, output_len=12),
        backends=("exact", "spectral-quality"),
        device="cpu",
        quantization="bitsandbytes",
        kv_cache_bytes=8 << 20,
        max_model_len=2048,
        enable_prefix_caching=False,
        decode_only=True,
        fit=True,
        output_dir=tmp_path,
    )
    assert run.main(options) == 0
    [file] = tmp_path.glob("throughput-*.json")
    exact, spectral = json.loads(file.read_text())["rows"]
    assert exact["stats"]["quantization"] == spectral["stats"]["quantization"] == "bitsandbytes"
    assert spectral["num_requests"] > exact["num_requests"]
