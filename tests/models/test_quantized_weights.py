"""Quantized checkpoints are unpacked or refused with their method, never called damaged."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from spectral_paged import LLM
from spectral_paged.errors import (
    InvalidRequestError,
    MissingPackageError,
    SpectralPagedError,
    UnsupportedModelError,
)
from spectral_paged.models import loader, quantized_weights
from spectral_paged.models.fp8_linear import to_fp8
from spectral_paged.models.option_checks import check_packed
from spectral_paged.models.quantized_weights import loading
from spectral_paged.models.weight_quantization import quantized
from spectral_paged.options import LLMOptions
from support.model_variants import build
from support.paths import ROOT
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
# a config, its method, the package that transformers asks for, and the extra that has it
PACKAGED = [
    (GPTQ, "gptq", "gptqmodel", "gptqmodel"),
    (GPTQ, "gptq", "optimum", "gptqmodel"),
    ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq", "gptqmodel", "gptqmodel"),
    ({"load_in_4bit": True}, "bitsandbytes", "bitsandbytes", "bitsandbytes"),
    ({"_load_in_8bit": True, "_load_in_4bit": False}, "bitsandbytes", *["bitsandbytes"] * 2),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, *["bitsandbytes"] * 3),
    ({"quant_method": "compressed-tensors"}, *["compressed-tensors"] * 3),
    ({"quant_method": "torchao", "quant_type": {}}, *["torchao"] * 3),
    ({"quant_method": "quanto", "weights": "int8"}, "quanto", "optimum-quanto", "quanto"),
]
SAID = [
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


@pytest.mark.parametrize("config, method, package, extra", PACKAGED)
def test_a_package_that_is_missing_is_named(folder, monkeypatch, config, method, package, extra):
    def version(name):
        if name == package:
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(quantized_weights, "version", version)
    edit(folder / "config.json", quantization_config=config)
    with pytest.raises(
        MissingPackageError, match=rf"\({method}\), which needs {package}"
    ) as caught:
        load(folder)
    assert f"pip install '.[{extra}]'" in str(caught.value)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(found.startswith(package) for found in extras["optional-dependencies"][extra])


@pytest.mark.parametrize("method", quantized_weights.PACKAGES)
def test_tensors_of_another_method_than_the_configs_are_refused(folder, monkeypatch, method):
    """transformers would answer for tensors that are missing, or leave their scales out."""
    monkeypatch.setattr(quantized_weights, "version", lambda name: "1.0")
    edit(folder / "config.json", quantization_config={"quant_method": method})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    where = "model.layers.0.self_attn.q_proj."
    index["weight_map"][where + "W_q"] = index["weight_map"].pop(where + "weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match="HQQ, by tensor"):
        load(folder)


def test_what_a_package_does_not_load_is_no_damage_alone(folder, monkeypatch):
    """The error names who was asked; nothing here loads weights of such a config."""
    monkeypatch.setattr(quantized_weights, "version", lambda name: "1.0")
    edit(folder / "config.json", quantization_config={"quant_method": "quanto", "weights": "int3"})
    with pytest.raises(SpectralPagedError, match="transformers 1.0 and optimum-quanto 1.0 load"):
        load(folder)


def test_quantized_mixtures_are_refused_by_method(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized_weights, "version", lambda name: "1.0")
    config = build("mixtral").config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UnsupportedModelError, match=r"\(bitsandbytes\) of a mixture of experts"):
        load(tmp_path)


@pytest.mark.parametrize("method", [m for m in quantized_weights.PACKAGES if "compr" not in m])
def test_packed_weights_are_not_quantized_again(folder, monkeypatch, method):
    monkeypatch.setattr(quantized_weights, "version", lambda name: "1.0")
    edit(folder / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(InvalidRequestError, match=rf"quantized already \({method}\): leave it out"):
        LLM(str(folder), quantization="fp8-emulated", device="cpu", kv_cache_bytes=1 << 20)


EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    "config, eager, served",
    [
        (EIGHT, False, False),
        (EIGHT, True, True),
        (EIGHT | {"llm_int8_threshold": 0.0}, False, True),
        ({"_load_in_8bit": True}, False, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False, True),
        (GPTQ, False, True),
        (None, False, True),
    ],
)
@pytest.mark.parametrize("as_object", [False, True])
def test_graphs_need_products_that_look_at_no_values(config, eager, served, as_object):
    model = LlamaConfig()
    if config is not None:
        model.quantization_config = SimpleNamespace(**config) if as_object else config
    options, cuda = LLMOptions(enforce_eager=eager), torch.device("cuda")
    if served:
        check_packed(options, model, device=cuda)
    else:
        with pytest.raises(InvalidRequestError, match="enforce_eager=True"):
            check_packed(options, model, device=cuda)
    check_packed(options, model, device=torch.device("cpu"))


FP8_GROUP = {"weights": {"type": "float", "num_bits": 8}}
INT4_GROUP = {"weights": {"type": "int", "num_bits": 4}}


@pytest.mark.parametrize(
    "groups, device, dtype, capability, kept",
    [
        ([FP8_GROUP], "cuda", torch.bfloat16, (8, 9), True),
        ([FP8_GROUP, FP8_GROUP], "cuda", torch.bfloat16, (9, 0), True),
        ([FP8_GROUP], "cuda", torch.bfloat16, (8, 6), False),
        ([FP8_GROUP], "cuda", torch.float16, (9, 0), False),
        ([FP8_GROUP], "cpu", torch.bfloat16, (9, 0), False),
        ([FP8_GROUP, INT4_GROUP], "cuda", torch.bfloat16, (9, 0), False),
        ([INT4_GROUP], "cuda", torch.bfloat16, (9, 0), False),
        ([], "cuda", torch.bfloat16, (9, 0), False),
    ],
)
def test_compressed_tensors_are_unpacked_but_where_a_gpu_multiplies_them(
    monkeypatch, groups, device, dtype, capability, kept
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    given = {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    config, where = LlamaConfig(quantization_config=given), torch.device(device)
    assert loading(config, where, dtype) == {"device_map": {"": where}}
    assert given["use_optimized_inference"] is kept and given["dequantize"] is not kept


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
