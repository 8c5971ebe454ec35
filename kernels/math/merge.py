"""Merge partial attention results by their log-sum-exp (Dao et al. 2022, online softmax)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine partials `outs[i]` fp32 `[..., D]` with `lses[i]` fp32 `[...]`.

    An empty partial carries lse = -inf and gets weight zero; all partials empty gives zeros and
    -inf, never NaN. Returns the merged output and its lse.
    """
    lse = torch.stack(lses)
    top = lse.amax(dim=0)
    safe_top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    weights = torch.exp(lse - safe_top)
    total = weights.sum(dim=0)
    stacked = torch.stack(outs)
    stacked = torch.where(torch.isneginf(lse).unsqueeze(-1), torch.zeros_like(stacked), stacked)
    out = (weights.unsqueeze(-1) * stacked).sum(dim=0)
    out = out / torch.where(total == 0, torch.ones_like(total), total).unsqueeze(-1)
    return out, safe_top + torch.log(total)
