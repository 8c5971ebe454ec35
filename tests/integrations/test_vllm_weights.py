"""Weights in vLLM's layout give the calibration and fingerprint of transformers' model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

from spectral_paged.errors import InvalidRequestError, UnsupportedModelError
from spectral_paged.integrations.vllm.weights import attention_layers
from spectral_paged.models.calibration import model_fingerprint, output_moment

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "pad_token_id": 0,
}
MODELS = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "llama, biases": (tf.LlamaConfig, tf.LlamaForCausalLM, {"attention_bias": True}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, {}),
}
PARTS = ("q_proj", "k_proj", "v_proj")


def of_transformers(name):
    config, model, changes = MODELS[name]
    torch.manual_seed(1)
    made = model(config(**SHAPE | changes)).eval()
    with torch.no_grad():
        for key, value in made.named_parameters():
            if key.endswith("bias"):  # they start as zeros, which any slice of zeros equals
                value.normal_()
    return made


def linear(weight, bias):
    copied = None if bias is None else bias.data.clone()
    return SimpleNamespace(weight=nn.Parameter(weight.clone()), bias=copied)


def fused(attention):
    """q, k and v of an attention of transformers as vLLM's one weight and bias."""
    if hasattr(attention, "qkv_proj"):
        return linear(attention.qkv_proj.weight.data, attention.qkv_proj.bias)
    parts = [getattr(attention, part) for part in PARTS]
    biases = [part.bias for part in parts]
    bias = None if biases[0] is None else torch.cat([b.data for b in biases])
    return linear(torch.cat([part.weight.data for part in parts]), bias)


def in_vllm(model, packed=PARTS):
    """A stand-in for vLLM's model of the same weights."""
    layers = [
        SimpleNamespace(
            self_attn=SimpleNamespace(
                qkv_proj=fused(layer.self_attn),
                kv_size=32,
                o_proj=linear(layer.self_attn.o_proj.weight.data, layer.self_attn.o_proj.bias),
            )
        )
        for layer in model.model.layers
    ]
    return SimpleNamespace(
        packed_modules_mapping={"qkv_proj": list(packed)}, model=SimpleNamespace(layers=layers)
    )


def as_loaded(model, served):
    layers = attention_layers(served)
    return SimpleNamespace(config=model.config, model=SimpleNamespace(layers=layers))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_the_same_model_in_vllm(name):
    model = of_transformers(name)
    served = in_vllm(model, ("qkv_proj",) if name == "phi3" else PARTS)
    view = as_loaded(model, served)
    assert model_fingerprint(view) == model_fingerprint(model)
    assert torch.equal(output_moment(view, 2, 16), output_moment(model, 2, 16))
    served.model.layers[1].self_attn.qkv_proj.weight.data[-1] *= -1  # views, not copies
    assert model_fingerprint(view) != model_fingerprint(model)


def test_the_bias_of_keys_counts():
    model = of_transformers("qwen2")
    served = in_vllm(model)
    served.model.layers[0].self_attn.qkv_proj.bias[64] *= -1
    assert model_fingerprint(as_loaded(model, served)) != model_fingerprint(model)


@pytest.mark.parametrize("weight", [torch.float8_e4m3fn, torch.int8, torch.uint8, None])
@pytest.mark.parametrize("part", ["qkv_proj", "o_proj"])
def test_quantized_weights_are_refused_with_a_format_that_works(part, weight):
    served = in_vllm(of_transformers("llama"))
    projection = getattr(served.model.layers[1].self_attn, part)
    if weight is None:  # packed, under names of its own
        del projection.weight
    else:
        projection.weight = projection.weight.data.to(weight).T
    with pytest.raises(InvalidRequestError, match=r"quantized.*spectral-page"):
        attention_layers(served)


def test_layers_of_another_build_are_refused():
    served = in_vllm(of_transformers("llama"))
    del served.model.layers[1].self_attn.qkv_proj
    with pytest.raises(UnsupportedModelError, match=r"qkv_proj.*spectral-page"):
        attention_layers(served)
