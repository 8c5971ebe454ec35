"""Merge partial attention results by their log-sum-exp, in Triton.

For callers of single ops, whose results are whole; `decode_attention` merges items instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.triton_page import padded


@triton.jit
def _merge_kernel(
    a_ptr, b_ptr, a_lse_ptr, b_lse_ptr, out_ptr, lse_ptr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    dim = tl.arange(0, DIM_PAD)
    a_lse, b_lse = tl.load(a_lse_ptr + row), tl.load(b_lse_ptr + row)
    top = tl.maximum(a_lse, b_lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    a_weight, b_weight = tl.exp(a_lse - safe), tl.exp(b_lse - safe)
    total = a_weight + b_weight
    whole = tl.where(total == 0, 1.0, total)
    a = tl.load(a_ptr + row * DIM + dim, mask=dim < DIM, other=0.0)
    b = tl.load(b_ptr + row * DIM + dim, mask=dim < DIM, other=0.0)
    a = tl.where(a_weight > 0, a, 0.0)  # an empty partial may hold anything
    b = tl.where(b_weight > 0, b, 0.0)
    tl.store(out_ptr + row * DIM + dim, (a * a_weight + b * b_weight) / whole, mask=dim < DIM)
    tl.store(lse_ptr + row, tl.where(total == 0, float("-inf"), safe + tl.log(whole)))


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`kernels.merge.merge` in Triton: the same arguments and results."""
    out, lse = outs[0].contiguous(), lses[0].contiguous()
    for other, other_lse in zip(outs[1:], lses[1:], strict=True):
        new_out, new_lse = torch.empty_like(out), torch.empty_like(lse)
        _merge_kernel[(lse.numel(),)](
            out, other.contiguous(), lse, other_lse.contiguous(), new_out, new_lse,
            DIM=out.shape[-1], DIM_PAD=padded(out.shape[-1], 1), num_warps=1,
        )  # fmt: skip
        out, lse = new_out, new_lse
    return out, lse
