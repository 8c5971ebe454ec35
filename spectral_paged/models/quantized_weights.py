"""Quantized checkpoints are known by their config or their tensors: served, or refused by method.

transformers loads them, each method by a package of its own:

```
unpacked as they are loaded   fp8 by blocks; compressed-tensors, but FP8 where a GPU multiplies it
packed, also on the device    bitsandbytes, torchao, quanto, gptq, awq
```

For other methods it would answer for tensors that are not there, or load numbers without their
scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import QuantoConfig

from spectral_paged.errors import UnsupportedModelError, missing_extra
from spectral_paged.models.geometry import ModelGeometry

CONFIG_FIELDS = ("quantization_config", "compression_config", "quantization")
# method -> endings of the names of tensors that only its weights have
TENSORS = {
    "GPTQ or AWQ": r"qweight|qzeros|g_idx",
    "bitsandbytes": r"SCB|weight_format|weight\.((nested_)?(absmax|quant_map)|quant_state\..+)",
    "compressed-tensors": r"weight_(packed|shape|zero_point|global_scale)",
    "HQQ": r"W_q",
    "quanto": r"weight\._(data|scale)",
    "fp8 or another with scales": r"weight_scale(_inv|_2)?|scales|qscale|(input|activation)_scale",
}
# method -> the extra of this project that has its packages, and they
PACKAGES = {
    "bitsandbytes": ("bitsandbytes", ("bitsandbytes",)),
    "compressed-tensors": ("compressed-tensors", ("compressed-tensors",)),
    "torchao": ("torchao", ("torchao",)),
    "quanto": ("quanto", ("optimum-quanto",)),
    "gptq": ("gptqmodel", ("gptqmodel", "optimum")),
    "awq": ("gptqmodel", ("gptqmodel",)),
}
# method -> rows of `TENSORS` that its own checkpoints have
OWN_TENSORS = {
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors", "fp8 or another with scales"),
    "torchao": (),
    "quanto": (),
    "gptq": ("GPTQ or AWQ", "fp8 or another with scales"),
    "awq": ("GPTQ or AWQ", "fp8 or another with scales"),
}
COMPRESSED, EIGHT_BITS = "compressed-tensors", "load_in_8bit"
FP8_CAPABILITY = (8, 9)  # from which transformers multiplies FP8 of compressed-tensors
BLOCK_SCALES = ".weight_scale_inv"  # ends the names of scales of the FP8 weights that are unpacked
PLAIN = "take the checkpoint that it was made of (quantization='fp8' makes its weights FP8)"
_ENDINGS = {method: re.compile(rf".*\.({endings})") for method, endings in TENSORS.items()}


def check_config(where: str, config: Any) -> None:
    """Refuse a model whose config says that its weights are quantized by a method not served here.

    Raises:
        UnsupportedModelError: it says so.
        MissingPackageError: the method is served, by a package that is not installed.
    """
    method = method_in(config)
    if method is None or blocks(config) is not None:
        return
    if method not in PACKAGES:
        raise _refused(where, method)
    check_package(f"{where} is a quantized checkpoint ({method})", method)


def check_package(what: str, method: str) -> None:
    """Refuse a method whose package is not installed.

    Raises:
        MissingPackageError: it is not; the message names it and the extra that has it.
    """
    extra, packages = PACKAGES[method]
    for package in packages:
        if _version(package) is None:
            raise missing_extra(f"{what}, which needs {package}", extra)


def is_packed(config: Any) -> bool:
    """Return whether a model's weights stay packed once they are loaded."""
    return places_weights(config) and method_in(config) != COMPRESSED


def places_weights(config: Any) -> bool:
    """Return whether weights are loaded where they will lie, for packed ones are not moved."""
    return method_in(config) is not None and blocks(config) is None


def waits_for_the_host(config: Any) -> bool:
    """Return whether the products of packed weights look at values, so no CUDA graph has them.

    8-bit products of bitsandbytes look for outliers, unless their threshold is 0.
    """
    if method_in(config) != "bitsandbytes":
        return False
    values = _values(config.quantization_config)
    eight = values.get(EIGHT_BITS) or values.get(f"_{EIGHT_BITS}")
    return bool(eight) and float(values.get("llm_int8_threshold", 6.0)) > 0


def loading(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantized weights need; `config` is changed.

    Args:
        device: where they will lie.

    Raises:
        Exception: whatever transformers raises for a config that it does not read.
    """
    method = method_in(config)
    if method is None:
        return {}
    given = config.quantization_config
    if blocks(config) is not None:
        given["dequantize"] = True
        return {}
    if method == "quanto":  # its checkpoints are plain, and it quantizes as they are loaded
        del config.quantization_config
        return {"quantization_config": QuantoConfig.from_dict(given), "device_map": {"": device}}
    if method == COMPRESSED:
        given["use_optimized_inference"] = fast = _multiplies_fp8(given, device, dtype)
        given["dequantize"] = not fast
    return {"device_map": {"": device}}


def _multiplies_fp8(given: dict[str, Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a GPU multiplies the weights of compressed-tensors as they are: all FP8."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    groups = (given.get("config_groups") or {}).values()
    weights = [(group.get("weights") or {}) for group in groups]
    fp8 = [(found.get("type"), found.get("num_bits")) == ("float", 8) for found in weights]
    return bool(fp8) and all(fp8) and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def loaders(config: Any) -> str:
    """Return what loads a quantized checkpoint, with versions, for an error message."""
    _, packages = PACKAGES.get(method_in(config) or "", ("", ()))
    names = ("transformers", *packages)
    return " and ".join(f"{name} {_version(name)}" for name in names)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _values(given: Any) -> dict[str, Any]:
    """Return the fields of a config of quantization, in a file's form or transformers'."""
    found: dict[str, Any] = given if isinstance(given, dict) else vars(given)
    return found


def blocks(config: Any) -> Sequence[int] | None:
    """Return rows and columns of the blocks of FP8 weights, as DeepSeek and Qwen publish them.

    None: the config says nothing of FP8, or not of blocks.
    """
    given = getattr(config, "quantization_config", None)
    if not isinstance(given, dict) or given.get("quant_method") != "fp8":
        return None
    size = given.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2:
        return None
    return size if all(type(count) is int and count > 0 for count in size) else None


def method_in(config: Any) -> str | None:
    """Return how a config says that its model's weights are quantized; None if it does not."""
    for field in CONFIG_FIELDS:
        given = getattr(config, field, None)
        if given is None:
            continue
        values = _values(given)
        method = values.get("quant_method") or values.get("quant_algo")
        if method is None:
            loads = any(key.lstrip("_").startswith(("load_in_", "bnb_")) for key in values)
            method = "bitsandbytes" if loads else f"{field} names no method"
        return str(getattr(method, "value", method))
    return None


def check_dense(where: str, config: Any, geometry: ModelGeometry) -> None:
    """Refuse a quantized checkpoint that has experts, of which nothing checks the scales.

    Raises:
        UnsupportedModelError: it has.
    """
    if (method := method_in(config)) is not None and geometry.has_experts:
        kind = "an FP8 checkpoint" if method == "fp8" else f"a quantized checkpoint ({method})"
        raise UnsupportedModelError(
            f"{where} is {kind} of a mixture of experts, and those of dense models are served: "
            "take the checkpoint in bf16 that it was made of"
        )


def check_unpacked(where: str, model: Any, block: Sequence[int]) -> None:
    """Refuse a loaded model of which transformers may have unpacked weights by other blocks.

    It divides a matrix evenly by its scales, which is wrong where the last block is a part of one.

    Args:
        block: rows and columns that have a scale in common.

    Raises:
        UnsupportedModelError: a matrix is no whole number of blocks, or FP8 still.
    """
    for name, module in model.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if any(size % of for size, of in zip(module.weight.shape, block, strict=True)):
            raise UnsupportedModelError(
                f"{where} has a scale each {block[0]} x {block[1]} weights, and {name} is "
                f"{module.out_features} x {module.in_features}: {PLAIN}"
            )
        if module.weight.itemsize < 2:
            raise UnsupportedModelError(f"{where} is FP8, and {name} was not unpacked: {PLAIN}")


def check_tensors(where: str, names: Iterable[str], config: Any) -> None:
    """Refuse a model with tensors that only quantized weights have, and not those of its config.

    Raises:
        UnsupportedModelError: it has one; the message has its name.
    """
    ours = BLOCK_SCALES if blocks(config) is not None else "\0"
    own = OWN_TENSORS.get(method_in(config) or "", ())
    for name in names:
        if name.endswith(ours):
            continue
        for method, ending in _ENDINGS.items():
            if method not in own and ending.fullmatch(name):
                raise _refused(where, f"{method}, by tensor {name!r}")


def tensor_names(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors; none if it is damaged, as loading tells."""
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def _refused(where: str, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} is a quantized checkpoint ({how}), and those of fp8 by blocks, "
        f"{', '.join(PACKAGES)} are read beside fp32, fp16 and bf16: {PLAIN}, or a GGUF file; or "
        "load it with transformers and the packages of its method, and give the model to "
        "LLM.from_model"
    )
