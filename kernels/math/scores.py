"""Soft-capping of attention scores, and merging of partial results of a softmax with sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def check_softcap(softcap: float | None) -> None:
    """Refuse a softcap that is not positive; None is no cap.

    Raises:
        ValueError: the cap is zero, negative or NaN.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: give a positive number, or None for no cap")


@dataclass(frozen=True, slots=True)
class Scores:
    """The factor and the cap that turn products of queries and keys into scores.

    scale: the softmax scale.
    softcap: scores s become `softcap tanh(s / softcap)` (Gemma 2); None caps none.
    has_sinks: every softmax has a sink, which each call brings (`with_sinks`).

    Raises:
        ValueError: a softcap that is not positive.
    """

    scale: float
    softcap: float | None = None
    has_sinks: bool = False

    def __post_init__(self) -> None:
        check_softcap(self.softcap)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped scores, `softcap tanh(scores / softcap)`, inside (-softcap, softcap).

    Gemma 2, 2024. None caps none.

    Raises:
        ValueError: a softcap that is not positive.
    """
    check_softcap(softcap)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge partial attention results by their log-sum-exp (Dao et al. 2022, online softmax).

    Partials are `outs[i]` fp32 `[..., D]` with `lses[i]` fp32 `[...]`. An empty one has lse = -inf
    and weight zero. Where all are empty the result is zeros and -inf, never NaN. Returns the merged
    output and its lse.
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


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention whose softmax has one more score a head, a sink, which has weight and no value.

    A learned sink (gpt-oss, 2025) adds exp(sink) to the sum of weights, so it takes of the result
    what falls to it. It is neither scaled nor capped.

    Args:
        out: `[..., Hq, D]`, attention without sinks.
        lse: fp32 `[..., Hq]`, the log-sum-exp of its scores; -inf where there are none.
        sinks: `[Hq]`.

    Returns:
        `[..., Hq, D]` in the dtype of `out`.
    """
    share = torch.sigmoid(lse - sinks.float()).unsqueeze(-1)
    return (out * share).to(out.dtype)
