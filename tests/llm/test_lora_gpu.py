"""Adapters in graphs and compiled layers say what they say without; `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_paged import LLM, LoRARequest, SamplingParams
from spectral_paged.models.lora import LayerAdapter, LoRALinear, TokenAdapters
from support.lora_adapters import KINDS, save_kinds
from support.tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
PARAMS = SamplingParams(temperature=0.0, max_tokens=40)
PROMPTS = random_prompts([1, 64, 577, 640, 1217, 9, 70, 300])
LORA = {"enable_lora": True, "max_loras": 3}


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    paths = save_kinds(tmp_path_factory.mktemp("adapters"))
    return [None, *(LoRARequest(name, n, paths[name]) for n, name in enumerate(KINDS, start=1))]


def tokens(llm, asked):
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, lora_request=asked)
    return [output.outputs[0].token_ids for output in outputs]


def on_gpu(format, **options):
    return LLM.from_model(
        tiny_model().to(DEVICE),
        kv_format=tiny_format(format),
        kv_cache_bytes=16 << 20,
        debug_poison=True,
        **LORA,
        **options,
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("format", ["exact", "spectral-int8"])
def test_graphs_with_adapters_say_what_eager_layers_say(format, compiled, requests):
    """Both seal on one device: pages of two devices differ in their last bits."""
    plain, llm = on_gpu(format, enforce_eager=True), on_gpu(format, compile_layers=compiled)
    for shift in range(3):
        asked = [requests[(place + shift) % 4] for place in range(len(PROMPTS))]
        assert tokens(llm, asked) == tokens(plain, asked)
    before = llm.stats()["num_graphs"]
    llm.remove_lora(1)
    plain.remove_lora(1)
    assert tokens(llm, asked) == tokens(plain, asked), "it is loaded again, to another place"
    assert tokens(llm, None) == tokens(plain, None)
    assert tokens(llm, asked) == tokens(plain, asked)
    assert (llm.stats()["pages_attended"] > 0) == (format != "exact")
    llm.cache.check_integrity()
    assert plain.stats()["model_step"] == "eager" and plain.stats()["graph_replays"] == 0
    stats = llm.stats()
    assert ("compiled" in stats["model_step"]) == compiled
    assert stats["graph_replays"] > 0 and stats["num_graphs"] <= 2 * before


def test_exact_pages_with_adapters_say_what_the_cpu_says(requests):
    here, there = tiny_llm("exact", **LORA), on_gpu("exact", enforce_eager=True)
    for shift in range(3):
        asked = [requests[(place + shift) % 4] for place in range(len(PROMPTS))]
        assert tokens(there, asked) == tokens(here, asked)


@torch.inference_mode()
def test_both_forms_agree_in_bf16():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped products need compute capability 9.0")
    device, dtype = torch.device("cuda"), torch.bfloat16
    base = nn.Linear(256, 384, device=device, dtype=dtype)
    indices = torch.randint(5, (1000,), dtype=torch.int32, device=device)
    inputs, found = torch.randn(1, 1000, 256, device=device, dtype=dtype), []
    written = [(torch.randn(16, 256) / 16, torch.randn(384, 16) / 4) for _ in range(4)]
    for grouped in (False, True):
        adapters = TokenAdapters(4, 16, device, grouped=grouped)
        layer = LoRALinear(base, adapters, 4, 16, device=device, dtype=dtype)
        for index, (a, b) in enumerate(written, start=1):
            layer.write(index, LayerAdapter(a, b, 0.5).factors(dtype))
        with adapters.of(indices):
            layer(inputs)  # kernels are loaded before a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), adapters.of(indices):
            output = layer(inputs)
        graph.replay()
        found.append(output.clone())
    torch.testing.assert_close(*found, rtol=2e-2, atol=5e-2)
    assert torch.equal(found[0][0, indices == 0], base(inputs)[0, indices == 0])
