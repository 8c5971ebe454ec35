"""Quantized checkpoints are refused with their method and a remedy, never called damaged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from spectral_paged.errors import UnsupportedModelError
from spectral_paged.models import loader
from support.tiny_model import tiny_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A sharded model without a tokenizer."""
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def load(where):
    return loader.load_model(str(where), device=torch.device("cpu"), dtype=torch.float32)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
SAID = [
    ("quantization_config", GPTQ, "gptq"),
    ("quantization_config", {"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq"),
    ("quantization_config", {"load_in_4bit": True}, "bitsandbytes"),
    ("quantization_config", {"_load_in_8bit": True, "_load_in_4bit": False}, "bitsandbytes"),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ("compression_config", {"quant_method": "sparseml"}, "sparseml"),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ("quantization_config", {"quant_method": "exl2", "bits": 4.0}, "exl2"),
    ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
    ("quantization_config", {"quant_method": "of tomorrow"}, "of tomorrow"),
    ("quantization_config", {}, "quantization_config names no method"),
    ("quantization", {"group_size": 64, "bits": 4}, "quantization names no method"),
]


@pytest.mark.parametrize("key, value, method", SAID)
def test_a_quantized_checkpoint_is_refused_by_its_method(folder, key, value, method):
    edit(folder / "config.json", **{key: value})
    with pytest.raises(UnsupportedModelError, match=rf"quantized.*\({method}\)") as caught:
        load(folder)
    assert "from_model" in str(caught.value) and "fetch" not in str(caught.value)


def test_a_config_that_names_no_quantization_loads(folder):
    edit(folder / "config.json", quantization_config=None)
    assert load(folder).geometry.num_layers == 2


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    "endings, method",
    [
        (("qweight", "qzeros", "scales", "g_idx"), "GPTQ or AWQ"),
        (("weight", "weight.absmax", "weight.quant_map"), "bitsandbytes"),
        (("weight", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        (("weight", "SCB"), "bitsandbytes"),
        (("weight_packed", "weight_shape", "weight_scale"), "compressed-tensors"),
        (("weight", "weight_scale"), "fp8"),
        (("weight", "weight_scale_inv"), "fp8"),
        (("weight", "scales", "biases"), "fp8 or another"),
        (("W_q", "meta"), "HQQ"),
        (("weight._data", "weight._scale"), "quanto"),
    ],
)
def test_quantized_tensors_are_known_without_a_word_in_the_config(folder, endings, method, sharded):
    """Scales that are left out would make other weights of the same names, and other text."""
    where = "model.layers.0.self_attn.q_proj."
    if sharded:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = index["weight_map"].pop(where + "weight")
        index["weight_map"] |= {where + ending: file for ending in endings}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        for path in folder.glob("*safetensors*"):
            path.unlink()
        tensors = {where + ending: torch.zeros(1) for ending in endings}
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"quantized checkpoint .*{method}"):
        load(folder)
