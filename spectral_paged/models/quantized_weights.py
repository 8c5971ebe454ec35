"""Quantized checkpoints are known by their config or their tensors: unpacked, or refused by method.

FP8 with a scale a block is unpacked by transformers to the model's dtype. For other methods it
would answer for the package that it misses or for tensors that are not there, or load numbers
without their scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from spectral_paged.errors import UnsupportedModelError
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
BLOCK_SCALES = ".weight_scale_inv"  # ends the names of scales of the FP8 weights that are unpacked
PLAIN = "take the checkpoint that it was made of (quantization='fp8' makes its weights FP8)"
_ENDINGS = {method: re.compile(rf".*\.({endings})") for method, endings in TENSORS.items()}


def check_config(where: str, config: Any) -> None:
    """Refuse a model whose config says that its weights are quantized, and not by blocks of FP8.

    Raises:
        UnsupportedModelError: it says so.
    """
    if (method := method_in(config)) is not None and blocks(config) is None:
        raise _refused(where, method)


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
        values = given if isinstance(given, dict) else vars(given)
        method = values.get("quant_method") or values.get("quant_algo")
        if method is None:
            loads = any(key.lstrip("_").startswith(("load_in_", "bnb_")) for key in values)
            method = "bitsandbytes" if loads else f"{field} names no method"
        return str(getattr(method, "value", method))
    return None


def check_dense(where: str, geometry: ModelGeometry) -> None:
    """Refuse a checkpoint of FP8 weights that has experts, of which nothing checks the scales.

    Raises:
        UnsupportedModelError: it has.
    """
    if geometry.has_experts:
        raise UnsupportedModelError(
            f"{where} is an FP8 checkpoint of a mixture of experts, and those of dense models are "
            "unpacked: take the checkpoint in bf16 that it was made of"
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
    """Refuse a model with tensors that only quantized weights have, but for scales of blocks.

    Raises:
        UnsupportedModelError: it has one; the message has its name.
    """
    ours = BLOCK_SCALES if blocks(config) is not None else "\0"
    for name in names:
        if name.endswith(ours):
            continue
        for method, ending in _ENDINGS.items():
            if ending.fullmatch(name):
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
        f"{where} is a quantized checkpoint ({how}), and weights are read in fp32, fp16 or bf16 "
        f"only: {PLAIN}, or a GGUF file; or load it with transformers and the packages of its "
        "method, and give the model to LLM.from_model with a kv_format that needs no calibration "
        "(spectral-int8)"
    )
