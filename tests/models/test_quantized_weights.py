"""Quantized checkpoints are unpacked or refused with their method, never called damaged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_paged.errors import UnsupportedModelError
from spectral_paged.models import loader
from spectral_paged.models.fp8_linear import to_fp8
from spectral_paged.models.weight_quantization import quantized
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
    ("quantization_config", {"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128]}, "fp8"),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [0, 0]}, "fp8"),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": "128"}, "fp8"),
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


# ---- FP8 by blocks -----------------------------------------------------------------------


def write_blocks(folder, block, **changes):
    """A checkpoint with an FP8 scale a block; returns its projections as they were and unpacked."""
    tiny_model(**changes).to(torch.bfloat16).save_pretrained(folder)
    stored, plain, unpacked = {}, {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        plain[name] = weight.float()
        codes = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.zeros([-(-n // of) for n, of in zip(weight.shape, block)])
        unpacked[name] = torch.zeros(weight.shape)
        for i, rows in enumerate(torch.arange(len(weight)).split(block[0])):
            for j, columns in enumerate(torch.arange(weight.shape[1]).split(block[1])):
                where = rows[:, None], columns
                found, scale = to_fp8(weight[where].reshape(1, -1))
                codes[where], scales[i, j] = found.view(len(rows), -1), scale
                unpacked[name][where] = codes[where].float() * scale
        stored |= {name: codes, f"{name}_scale_inv": scales}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    edit(folder / "config.json", quantization_config=fp8)
    return plain, unpacked


@pytest.mark.parametrize("block", [[32, 32], [16, 32], [32, 64]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_with_a_scale_a_block_is_unpacked(tmp_path, monkeypatch, block, dtype):
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    plain, unpacked = write_blocks(tmp_path, block, intermediate_size=128)
    loaded = loader.load_model(str(tmp_path), device=torch.device("cpu"), dtype=dtype)
    assert len(unpacked) == 14 and {x.dtype for x in loaded.model.parameters()} == {dtype}
    for name, want in unpacked.items():
        found = loaded.model.get_parameter(name)
        assert torch.equal(found, want.to(dtype))
        assert not torch.equal(found.float(), plain[name])
    again = quantized(loaded, "fp8-emulated", torch.device("cpu")).model
    for name, want in unpacked.items():
        layer = again.get_submodule(name.removesuffix(".weight"))
        error = layer.weight.float() * layer.weight_scale - want
        assert float(error.norm() / want.norm()) < 0.04


@pytest.mark.parametrize("changes", [{"intermediate_size": 96}, {"hidden_size": 96}])
def test_parts_of_blocks_are_refused_by_name(tmp_path, monkeypatch, changes):
    """transformers would take 96 rows with two scales for two blocks of 48."""
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    write_blocks(tmp_path, [32, 64], **changes)
    with pytest.raises(UnsupportedModelError, match="each 32 x 64 weights, and layers.0.* is "):
        load(tmp_path)


def test_a_scale_of_another_method_beside_blocks_is_refused(folder):
    edit(
        folder / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]},
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    where = "model.layers.0.self_attn.q_proj."
    index["weight_map"][where + "weight_scale"] = index["weight_map"][where + "weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match="fp8 or another with scales, by tensor"):
        load(folder)
