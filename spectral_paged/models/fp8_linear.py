"""A linear layer of FP8 weights, which rounds its inputs to FP8 at every call.

```
weight   e4m3 [out, in]   a scale each output, found once
inputs   e4m3 [n, in]     a scale each token, found at every call
output   (inputs @ weight^T), times both scales, plus the bias
```
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows `[n, k]` to FP8 (e4m3), the largest element of each to the largest code.

    Returns the codes `[n, k]` and the scales, fp32 `[n, 1]`. Their product is the row, each element
    within 1/16 of itself or 1/1024 of the scale.
    """
    wide = rows.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (wide / scales).to(FP8), scales


def emulated_product(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the product of FP8 inputs and weights by way of fp32, on any device."""
    return F.linear(codes.float() * scales, weight.float() * weight_scale).to(dtype)


def scaled_product(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the product of FP8 inputs and weights by FP8 tensor cores.

    inputs `[n, k]` with scales `[n, 1]`; weights `[m, k]` with scales `[m, 1]`; n and k multiples
    of 16; returns `[n, m]`, bf16 on CUDA.
    """
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scales,
        scale_b=weight_scale.t(),
        out_dtype=dtype,
        use_fast_accum=True,
    )


class FP8Linear(nn.Module):
    """A linear layer whose products are those of FP8 weights and FP8 inputs.

    Args:
        linear: gives weight and bias; it is not changed.
        device: where the weights will lie.
        emulated: multiply in fp32, which every device can.
    """

    def __init__(self, linear: nn.Linear, device: torch.device, *, emulated: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.emulated = emulated
        codes, scales = to_fp8(linear.weight.detach().to(device))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), False)

    def forward(self, inputs: Tensor) -> Tensor:
        codes, scales = to_fp8(inputs.flatten(0, -2))
        product = emulated_product if self.emulated else scaled_product
        output = product(codes, scales, self.weight, self.weight_scale, inputs.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.unflatten(0, inputs.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, emulated={self.emulated}"
