"""Windows, scales, caps and RoPE of GGUF files, against llama.cpp's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from spectral_paged.errors import SpectralPagedError, UnsupportedModelError
from spectral_paged.models.gguf import GGUFFile, convert_gguf
from spectral_paged.models.gguf.conversion import read_plan
from support.gguf_files import HEAD_DIM, plan_of, write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))


# ---- attention ---------------------------------------------------------------------------


def test_windows_become_the_configs():
    windowed = {"llama.attention.sliding_window": 64}
    assert plan_of("llama", windowed).config.model_type == "mistral"
    assert plan_of("llama", windowed).config.sliding_window == 64
    assert plan_of("phi3", {"phi3.attention.sliding_window": 64}).config.sliding_window == 64
    assert plan_of("gemma3", {}).config.sliding_window == 128
    with pytest.raises(UnsupportedModelError, match=r"qwen2\.attention\.sliding_window is 64"):
        plan_of("qwen2", {"qwen2.attention.sliding_window": 64})
    plan_of("qwen2", {"qwen2.attention.sliding_window": 512})  # no position reaches it


def test_scales_and_caps_of_gemma_become_the_configs():
    config = plan_of("gemma2", {"gemma2.attn_logit_softcapping": 40.0}).config
    assert config.attn_logit_softcapping == 40.0 and config.final_logit_softcapping == 30.0
    assert config.query_pre_attn_scalar == HEAD_DIM
    scaled = plan_of("gemma3", {"gemma3.attention.scale": 0.125}).config
    assert scaled.query_pre_attn_scalar == 64


# ---- RoPE --------------------------------------------------------------------------------


def frequencies(plan):
    """Inverse frequencies and attention factor of a plan's model."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(plan.config)
    rotary = model.model.rotary_emb
    prefix = "full_attention_" if hasattr(rotary, "full_attention_inv_freq") else ""
    return (
        getattr(rotary, f"{prefix}inv_freq").numpy().astype(np.float64),
        getattr(rotary, f"{prefix}attention_scaling"),
    )


def plain(theta=10000.0, dim=HEAD_DIM):
    return theta ** -(np.arange(0, dim, 2) / dim)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("named", [True, False])
def test_linear_scaling_is_applied_with_or_without_its_name(arch, named):
    keys = {f"{arch}.rope.scaling.factor": 4.0}
    keys |= {f"{arch}.rope.scaling.type": "linear"} if named else {}
    keys |= {"gemma3.attention.sliding_window_pattern": 2} if arch == "gemma3" else {}
    found, _ = frequencies(plan_of(arch, keys))
    np.testing.assert_allclose(found, plain() / 4.0, rtol=1e-5)


def test_local_layers_of_gemma3_are_not_scaled():
    keys = {"gemma3.rope.scaling.factor": 8.0, "gemma3.rope.freq_base_swa": 5000.0}
    rope = plan_of("gemma3", keys).config.rope_parameters
    assert rope["full_attention"]["factor"] == 8.0
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize("attention", [None, 1.5])
@pytest.mark.parametrize("original", [64, 128])
def test_yarn_is_applied_as_llama_cpp_does(original, attention):
    factor, theta, dim = 4.0, 10000.0, HEAD_DIM
    keys = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": factor,
        "llama.rope.scaling.original_context_length": original,
        "llama.rope.scaling.attn_factor": attention,
    }
    found, scaling = frequencies(plan_of("llama", keys))

    def corrected(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(corrected(32.0))), min(dim - 1, math.ceil(corrected(1.0)))
    ramp = 1.0 - np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0.0, 1.0)
    np.testing.assert_allclose(found, plain() / factor * (1 - ramp) + plain() * ramp, rtol=1e-4)
    assert scaling == pytest.approx((attention or 1.0) * (1.0 + 0.1 * math.log(factor)))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama3_are_applied(tmp_path, factor):
    """As llama.cpp's converter writes them: what each frequency is divided by."""
    theta = 500000.0
    divisors = []
    for frequency in plain(theta):
        wave = 2 * math.pi / frequency
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        if wave < 8192 / 4.0:
            divisors.append(1.0)
        elif wave > 8192:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(tmp_path / "l3.gguf", keys={"llama.rope.freq_base": theta}, extra=extra)
    found, scaling = frequencies(read_plan(GGUFFile(path)))
    assert len(set(divisors)) > 2 and scaling == 1.0
    np.testing.assert_allclose(found, plain(theta) / divisors, rtol=1e-5)


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("rope_freqs.weight", [1, 1, 1, 1, 1, 4, 8, 8], "not those of Llama 3"),
        ("rope_freqs.weight", [1, 1, 1, 1], "8 positive factors"),
        ("rope_freqs.weight", [1, 1, 1, 1, 1, 1, 1, 0], "8 positive factors"),
        ("rope_factors_long.weight", [1] * 8, "longrope"),
        ("rope_factors_short.weight", [1] * 8, "longrope"),
    ],
)
def test_factors_that_cannot_be_applied_are_refused(tmp_path, name, values, message):
    path = write_gguf(tmp_path / "f.gguf", extra={name: np.array(values, np.float32)})
    with pytest.raises(SpectralPagedError, match=f"{name}.*{message}"):
        convert_gguf(path)


def test_factors_of_one_change_nothing(tmp_path):
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    plan = read_plan(GGUFFile(write_gguf(tmp_path / "ones.gguf", extra=extra)))
    assert plan.config.rope_parameters["rope_type"] == "default"
