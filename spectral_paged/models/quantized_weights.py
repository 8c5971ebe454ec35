"""Quantized checkpoints are known by their config or their tensors, and refused with the method.

transformers would answer for the package that it misses or for tensors that are not there, or load
numbers without their scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spectral_paged.errors import UnsupportedModelError

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
_ENDINGS = {method: re.compile(rf".*\.({endings})") for method, endings in TENSORS.items()}


def check_config(where: str, config: Any) -> None:
    """Refuse a model whose config says that its weights are quantized, whatever the method.

    Raises:
        UnsupportedModelError: it says so.
    """
    if (method := method_in(config)) is not None:
        raise _refused(where, method)


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


def check_tensors(where: str, names: Iterable[str]) -> None:
    """Refuse a model with tensors that only quantized weights have.

    Raises:
        UnsupportedModelError: it has one; the message has its name.
    """
    for name in names:
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
        "only: take the checkpoint that it was made of (quantization='fp8' makes its weights FP8), "
        "or a GGUF file; or load it with transformers and the packages of its method, and give the "
        "model to LLM.from_model with a kv_format that needs no calibration (spectral-int8)"
    )
