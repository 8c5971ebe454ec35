"""Mixtures of experts: what cannot be run with them is refused, before weights are read."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import LLM, LoRARequest, SamplingParams
from spectral_paged.errors import InvalidRequestError, UnsupportedModelError
from spectral_paged.models.geometry import EXPERTS, ModelGeometry
from spectral_paged.models.option_checks import check_experts
from spectral_paged.options import LLMOptions
from support.lora_adapters import save_adapter
from support.padded_batch import BUILDERS, build
from support.tiny_model import random_prompts

MIXTURES = [name for name in BUILDERS if name.split(",")[0] in EXPERTS]


def geometry(name):
    return ModelGeometry.from_config(build(name).config)


def test_every_mixture_has_a_small_model_and_no_other_has_experts():
    assert {name.split(",")[0] for name in MIXTURES} == set(EXPERTS)
    assert {name for name in BUILDERS if geometry(name).has_experts} == set(MIXTURES)


def test_a_quantization_that_leaves_experts_out_is_refused(tmp_path):
    build("mixtral").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("these are no weights")
    options = {"device": "cpu", "kv_format": "exact", "kv_cache_bytes": 16 << 20}
    with pytest.raises(InvalidRequestError, match="the weights of experts are none"):
        LLM(str(tmp_path), quantization="fp8-emulated", **options)


def test_fp8_checkpoints_of_mixtures_are_refused(tmp_path):
    config = build("mixtral").config
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UnsupportedModelError, match="FP8 checkpoint of a mixture of experts"):
        LLM(str(tmp_path), device="cpu", kv_format="exact", kv_cache_bytes=16 << 20)


@pytest.mark.parametrize(
    "capability, dtype, eager, served",
    [
        ((9, 0), torch.bfloat16, False, True),
        ((10, 0), torch.bfloat16, False, True),
        ((8, 9), torch.bfloat16, False, False),
        ((9, 0), torch.float16, False, False),
        ((9, 0), torch.float32, False, False),
        ((8, 9), torch.bfloat16, True, True),
        ((9, 0), torch.float32, True, True),
    ],
)
def test_graphs_need_products_that_do_not_wait(capability, dtype, eager, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    options, cuda = LLMOptions(enforce_eager=eager), torch.device("cuda")
    check_experts(options, geometry("llama"), device=cuda, dtype=dtype)
    if served:
        check_experts(options, geometry("mixtral"), device=cuda, dtype=dtype)
        return
    with pytest.raises(InvalidRequestError, match="pass enforce_eager=True"):
        check_experts(options, geometry("mixtral"), device=cuda, dtype=dtype)


@pytest.mark.parametrize("name", MIXTURES)
def test_attention_of_a_mixture_has_adapters(name, tmp_path):
    path = save_adapter(tmp_path, model=build(name), targets=("q_proj", "v_proj", "o_proj"))
    options = {"kv_format": "exact", "kv_cache_bytes": 16 << 20, "enable_lora": True}
    llm, prompts = LLM.from_model(build(name), **options), random_prompts([9, 70, 3])
    params, low = SamplingParams(temperature=0.0, max_tokens=6), LoRARequest("low", 1, path)

    def tokens(given, asked):
        outputs = llm.generate(given, params, use_tqdm=False, lora_request=asked)
        return [output.outputs[0].token_ids for output in outputs]

    asked = [low, None, low]
    alone = [tokens([prompt], own)[0] for prompt, own in zip(prompts, asked)]
    assert tokens(prompts, asked) == alone
    assert alone[0] != tokens(prompts[:1], None)[0]
