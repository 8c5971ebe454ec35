"""The linear layers of a loaded model are quantized, layer by layer, as it goes to its device.

```
fp8            FP8 tensor cores, compute capability 8.9 or more
fp8-emulated   the same rounding, products in fp32, on any device: for trying what FP8 costs
bitsandbytes   NF4, 4 bits a weight and a scale for 64 of them, by the package of that name
```
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spectral_paged.errors import InvalidRequestError, UnsupportedModelError, shown, suggestion
from spectral_paged.models.calibration import fingerprint_of
from spectral_paged.models.fp8_linear import FP8Linear
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.quantized_weights import check_package, method_in

FP8, EMULATED, NF4 = "fp8", "fp8-emulated", "bitsandbytes"
METHODS = (FP8, EMULATED, NF4)
NF4_LAYER = "Linear4bit"
NF4_BLOCK = 64  # weights of a row that have a scale in common
LEAST_CAPABILITY = (8, 9)
TILE = 16  # the widths of matrices are multiples of it for the tensor cores


def check_method(method: object) -> None:
    """Refuse a `quantization` that is unknown, on every device.

    Raises:
        InvalidRequestError: it is neither None nor one of `METHODS`.
    """
    if method is None or method in METHODS:
        return
    meant = suggestion(method, METHODS) if isinstance(method, str) else ""
    raise InvalidRequestError(
        f"quantization is {shown(method)}; it must be None or one of {', '.join(METHODS)}, which "
        "quantize 16-bit weights as they are loaded" + (f": {meant}" if meant else "")
    )


def check_device(method: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a `quantization` that a device has no products for, before weights are read.

    Raises:
        InvalidRequestError: `fp8` on a CPU, on a GPU without FP8 tensor cores, or in another dtype
            than bf16.
        MissingPackageError: `bitsandbytes`, which is not installed.
    """
    if method == NF4:
        check_package(f"quantization={NF4!r}", NF4)
    if method != FP8:
        return
    other = (
        f"leave it out, or take quantization={EMULATED!r}, which rounds as it does and multiplies "
        "in fp32, slower than without"
    )
    needs = "quantization='fp8' needs a GPU of compute capability 8.9 or more (Ada, Hopper, later)"
    if device.type != "cuda":
        raise InvalidRequestError(f"{needs}, and device is {device.type}: {other}")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise InvalidRequestError(
            f"{needs}, and {name} has {capability[0]}.{capability[1]}: {other}"
        )
    if dtype != torch.bfloat16:
        raise InvalidRequestError(
            f"the products of quantization='fp8' are bfloat16, and dtype is "
            f"{str(dtype).removeprefix('torch.')}: take dtype='bfloat16'"
        )


def check_quantized(loaded: LoadedModel, method: str | None) -> None:
    """Refuse a `quantization` that a loaded model does not have.

    Raises:
        InvalidRequestError: it has another one, or none.
    """
    if method != loaded.quantization:
        raise InvalidRequestError(
            f"quantization is {shown(method)}, and {loaded.name} is loaded already, with "
            f"{loaded.quantization or 'weights as they are'}: give LLM its name, or take "
            f"quantization={loaded.quantization!r}"
        )


def quantization_of(model: Any) -> str | None:
    """Return how a model's weights are quantized, with what multiplies, or None if they are not."""
    for module in model.modules():
        if isinstance(module, FP8Linear):
            return EMULATED if module.emulated else f"{FP8} (torch._scaled_mm)"
        if type(module).__name__ == NF4_LAYER:
            return NF4
    return method_in(model.config)


@torch.no_grad()
def quantized(loaded: LoadedModel, method: str, device: torch.device) -> LoadedModel:
    """Return a model on `device` whose decoder layers have quantized weights; `loaded` is used up.

    Embeddings, norms and the head stay as they are. One matrix at a time is copied to `device` and
    rounded there, so `device` never holds the model in its own dtype.

    Raises:
        InvalidRequestError: as `check_device` says.
        UnsupportedModelError: a matrix is too odd for the products; the message names it.
    """
    model = loaded.model
    check_device(method, device, model.dtype)
    fingerprint = fingerprint_of(loaded)
    layers = {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, linear in layers.items():
        if reason := _too_odd(linear, method):
            raise UnsupportedModelError(
                f"{loaded.name}: layers.{name} is {linear.out_features} x {linear.in_features}, "
                f"and {reason}: leave quantization out, or take quantization={EMULATED!r}"
            )
    while layers:
        name, linear = layers.popitem()
        if method == NF4:
            layer: nn.Module = _nf4_layer(linear, device)
        else:
            layer = FP8Linear(linear, device, emulated=method == EMULATED)
        model.model.layers.set_submodule(name, layer)
        del linear  # its memory is free before the next one is copied
    return replace(loaded, model=model.to(device), quantization=method, fingerprint=fingerprint)


def _too_odd(linear: nn.Linear, method: str) -> str:
    """Return why a method has no product for a matrix, or ""."""
    if method == FP8 and (linear.in_features % TILE or linear.out_features % TILE):
        return f"FP8 tensor cores take multiples of {TILE}"
    if method == NF4 and linear.in_features % NF4_BLOCK:
        return f"a row of NF4 has a multiple of {NF4_BLOCK} weights"
    return ""


def _nf4_layer(linear: nn.Linear, device: torch.device) -> nn.Module:
    """Return a layer of bitsandbytes with the weights of `linear` in 4 bits, on `device`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, weight = linear.weight.dtype, linear.weight.detach().to(device)
    with torch.device("meta"):
        layer: Any = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
    layer.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    ).to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return layer.eval()
