"""The matrix of a linear layer, however its package stores it: as its products with unit vectors.

A quantized layer may keep codes and scales in a packed tensor, a tensor subclass, or buffers under
names of its own. What it multiplies by is the same question for all of them, and asked of the layer
itself it needs no knowledge of any layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spectral_paged.errors import UnsupportedModelError, cut

SAMPLE_COLUMNS = 256  # the most columns of a packed weight that it is sampled from
UNIT_ROWS = 1024  # unit vectors that a layer is given at a time


def is_linear(module: Any) -> bool:
    """Return whether a module maps rows of one width to rows of another, as `nn.Linear` does."""
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Module) and all(type(width) is int for width in widths)


def is_plain(linear: Any) -> bool:
    """Return whether a layer's `weight` is what it multiplies by: a tensor of 16 bits or more."""
    weight: Any = getattr(_without_adapters(linear), "weight", None)
    kinds = (Tensor, nn.Parameter)
    return type(weight) in kinds and weight.is_floating_point() and weight.itemsize >= 2


def _without_adapters(linear: Any) -> Any:
    """Return the layer inside a layer with adapters, PEFT's or those here, or the layer itself."""
    for inside in ("base_layer", "base"):
        linear = getattr(linear, inside, linear)
    return linear


def packed_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and modules of the linear layers of a model's decoder that are not plain."""
    for name, module in model.model.layers.named_modules():
        if is_linear(module) and not is_plain(module):
            yield f"model.layers.{name}", module


def check_products(where: str, model: Any) -> None:
    """Refuse a model whose packed layers cannot multiply as the engine has them do.

    Packages test their layers under `no_grad`, and steps run in inference mode, which is quicker.

    Raises:
        UnsupportedModelError: a kind of layer raises; the message has its name and the error.
    """
    tried = set()
    for name, layer in packed_layers(model):
        kind = type(layer), type(getattr(layer, "weight", None))
        if kind in tried:
            continue
        tried.add(kind)
        shape = 1, 1, layer.in_features
        try:
            with torch.inference_mode():
                layer(torch.zeros(shape, dtype=model.dtype, device=model.device))
        except Exception as error:
            reason = cut(" ".join(str(error).split()))
            raise UnsupportedModelError(
                f"{where} has packed weights that cannot multiply here ({name}, a "
                f"{kind[0].__name__} of {kind[1].__name__}: {reason}): take another quantization, "
                "or the checkpoint in bf16 that it was made of"
            ) from error


@torch.no_grad()
def packed_matrix(linear: Any, dtype: torch.dtype, columns: Tensor | None = None) -> Tensor:
    """Return the matrix that a packed layer multiplies by, `[out, in]`, or some of its columns.

    Adapters around the layer do not count.

    Args:
        dtype: of the inputs that the layer takes: that of the model.
        columns: their indices, int64 `[n]`; default all.

    Raises:
        Exception: whatever a layer raises that cannot multiply here.
    """
    linear = _without_adapters(linear)
    device = next(itertools.chain(linear.parameters(), linear.buffers())).device
    chosen = torch.arange(linear.in_features) if columns is None else columns
    bias = getattr(linear, "bias", None)
    if bias is not None:  # a sum with it would round the product
        linear.bias = None
    try:
        rows = []
        for part in chosen.to(device).split(UNIT_ROWS):
            units = nn.functional.one_hot(part, linear.in_features).to(dtype)
            rows.append(linear(units))
    finally:
        if bias is not None:
            linear.bias = bias
    return torch.cat(rows).t() + 0.0  # no zero keeps a sign


def why_not_read(projection: Any, dtype: torch.dtype) -> str:
    """Return why the matrix of a layer of packed weights cannot be read; "" if it can be."""
    try:
        column = packed_matrix(projection, dtype, torch.zeros(1, dtype=torch.int64))
    except Exception as error:
        return cut(" ".join(f"{type(projection).__name__}: {error}".split()))
    return "" if bool(column.isfinite().all()) else f"{type(projection).__name__} is not finite"


def sampled_weights(projection: Any, model: Any) -> Iterator[Tensor]:
    """Yield the weight and bias of a projection; of a packed weight some columns of its matrix."""
    if not is_linear(projection) or is_plain(projection):
        yield from projection.parameters()
        return
    width = projection.in_features
    columns = torch.arange(0, width, -(-width // SAMPLE_COLUMNS))
    yield packed_matrix(projection, model.dtype, columns)
    if (bias := getattr(_without_adapters(projection), "bias", None)) is not None:
        yield bias
