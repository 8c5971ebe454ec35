"""A vLLM model's attention weights in the layout of transformers, which calibrations know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from spectral_paged.errors import InvalidRequestError, UnsupportedModelError

INSTEAD = (
    "take a kv_format that needs no calibration (spectral-page, exact), or spectral-int8 with "
    "calibration='online'"
)


def attention_layers(model: Any) -> list[SimpleNamespace]:
    """Return the layers of a vLLM model with views of what calibration reads of each.

    vLLM keeps q, k and v in one weight and bias. transformers keeps them apart, but for families
    whose checkpoints have one too (Phi 3); vLLM's `packed_modules_mapping` tells which.

    Raises:
        UnsupportedModelError: layers are not built as those of the families that pages serve.
        InvalidRequestError: the weights are quantized.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    is_fused = "qkv_proj" in packed.get("qkv_proj", ())
    try:
        attentions = [layer.self_attn for layer in model.model.layers]
        parts = [(a.qkv_proj, a.kv_size, a.o_proj) for a in attentions]
    except AttributeError as error:
        raise UnsupportedModelError(
            f"a calibration cannot read the weights of vLLM's {type(model).__name__} ({error}): "
            f"{INSTEAD}"
        ) from error
    found = []
    for qkv, num_kv, output in parts:
        projections = {"o_proj": _projection(output)}
        if is_fused:
            projections["qkv_proj"] = _projection(qkv)
        else:
            projections["k_proj"] = _projection(qkv, slice(-2 * num_kv, -num_kv))
            projections["v_proj"] = _projection(qkv, slice(-num_kv, None))
        found.append(SimpleNamespace(self_attn=SimpleNamespace(**projections)))
    return found


def _projection(linear: Any, rows: slice = slice(None)) -> nn.Module:
    """Return some rows of a linear layer as a module with views of its weight and bias."""
    weight: Tensor | None = getattr(linear, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.itemsize < 2:
        kept = "in a layout of their own" if weight is None else f"as {weight.dtype}"
        raise InvalidRequestError(
            f"the model's weights are quantized (vLLM keeps them {kept}), so no calibration can be "
            f"made of them or checked against them: {INSTEAD}"
        )
    module = nn.Module()
    bias: Tensor | None = getattr(linear, "bias", None)
    for name, tensor in (("weight", weight), ("bias", bias)):  # in the order of `nn.Linear`
        if tensor is not None:
            module.register_parameter(name, nn.Parameter(tensor.data[rows], requires_grad=False))
    return module
