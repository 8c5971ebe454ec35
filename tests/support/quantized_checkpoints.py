"""Small random checkpoints, each quantized and saved by the means of its own package."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from support.tiny_model import tiny_model

WIDTHS = {"intermediate_size": 128}  # multiples of the blocks of all packages


def four_bits(**changes):
    fields = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | changes
    return BitsAndBytesConfig(load_in_4bit=True, **fields)


def int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# kind -> its package, and how transformers quantizes a model to it
BY_TRANSFORMERS = {
    "bitsandbytes 4-bit": ("bitsandbytes", four_bits),
    "bitsandbytes 4-bit nested": (
        "bitsandbytes",
        lambda: four_bits(bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes 8-bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": ("torchao", int8_weights),
}
# kind -> its package, and the type, bits and groups of its weights
COMPRESSED = {
    "compressed-tensors fp8": ("compressed-tensors", ("float", 8, None)),
    "compressed-tensors w4a16": ("compressed-tensors", ("int", 4, 32)),
}
# kind -> its package, and the config beside plain weights
AT_LOADING = {
    "quanto int8": ("optimum-quanto", {"weights": "int8"}),
    "quanto float8": ("optimum-quanto", {"weights": "float8"}),
}
KINDS = {**BY_TRANSFORMERS, **COMPRESSED, **AT_LOADING}


# kind -> its packages, and its method; only a GPU's kernels are known to read them
FOUR_BITS_IN_INTEGERS = {"gptq": ("gptqmodel optimum", "gptq"), "awq": ("gptqmodel", "awq")}
GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight codes in an integer, lowest bits first


def is_installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def write(kind, folder, dtype=torch.float32, **changes):
    """Save a checkpoint of a kind of `KINDS`; `changes` are of the model's config."""
    model = tiny_model(**(WIDTHS | changes)).to(dtype)
    if kind in FOUR_BITS_IN_INTEGERS:
        _write_integers(model, kind, folder)
        return
    how = KINDS[kind][1]
    if kind in COMPRESSED:
        compressor = _compress(model, *how)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return
    if kind in AT_LOADING:
        model.config.quantization_config = QuantoConfig(**how)
    else:
        model.save_pretrained(folder / "plain")
        model = AutoModelForCausalLM.from_pretrained(
            folder / "plain", quantization_config=how(), dtype=dtype, device_map={"": "cpu"}
        )
    model.save_pretrained(folder)


def _compress(model, kind, bits, group):
    """Quantize linear layers as llm-compressor does: a scale an output, or a group of inputs."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    strategy = "channel" if group is None else "group"
    weights = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, group_size=group)
    inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs if group is None else None
    )
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups={"all": scheme},
            ignore=["lm_head"],
            format="float-quantized" if kind == "float" else "pack-quantized",
            quantization_status="frozen",
        ),
    )
    largest = 448.0 if kind == "float" else 7.0
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            peaks = module.weight.detach().unflatten(1, (-1, group or module.in_features)).abs()
            module.weight_scale.data = (peaks.amax(-1) / largest).view_as(module.weight_scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def _in_integers(codes, order=range(8)):
    """Eight codes of the last dimension in one int32."""
    parts = codes.to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(parts[..., code] << 4 * place for place, code in enumerate(order))
    return packed.where(packed < 2**31, packed - 2**32).to(torch.int32).contiguous()


def _write_integers(model, method, folder):
    """Save a model as GPTQ or AWQ do: 4 bits and a scale for `GROUP` inputs of an output."""
    model.to(torch.float16).save_pretrained(folder)
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        groups = weight.float().t().unflatten(0, (-1, GROUP))  # [groups, GROUP, out]
        scales = (groups.abs().amax(1) / 7).to(torch.float16)
        codes = (groups / scales[:, None]).round().clamp(-8, 7).flatten(0, 1) + 8  # [in, out]
        zeros = torch.full(scales.shape, 8 if method == "awq" else 7)  # GPTQ keeps one less
        if method == "awq":
            found = {"qweight": _in_integers(codes, AWQ_ORDER)}
            found["qzeros"] = _in_integers(zeros, AWQ_ORDER)
        else:
            found = {"qweight": _in_integers(codes.t()).t().contiguous()}
            found["qzeros"] = _in_integers(zeros)
            found["g_idx"] = torch.arange(len(codes), dtype=torch.int32) // GROUP
        found["scales"] = scales
        stored |= {name.removesuffix("weight") + key: value for key, value in found.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    own = {"zero_point": True, "version": "gemm"}
    if method == "gptq":
        own = {"desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    said = {"quant_method": method, "bits": 4, "group_size": GROUP} | own
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
