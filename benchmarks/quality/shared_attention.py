"""Attention of many continuations over one shared context, by torch's fused kernels.

Two parts are merged by their log-sum-exp: attention to the shared context, which every query reads
without a mask, and attention of each row's new tokens among themselves. So the context is neither
copied nor expanded, and no mask of its length is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION_NAME = "spectral_paged_replay"


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its scores, by torch's fused kernels.

    `q` is `[B, H, n, D]`, `k` and `v` are `[B, H, m, D]`; causal needs n = m.
    Returns `[B, H, n, D]` in q's dtype and fp32 `[B, H, n]`.
    """
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
    elif q.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        lse = lse[:, :, : q.shape[2]]  # padded to the kernel's tile
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
    return out, lse.float()


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One attention output from outputs `[..., D]` over disjoint keys and their log-sum-exps."""
    outs, lses = zip(*parts, strict=True)
    if len(parts) == 1:
        return outs[0]
    weights = torch.softmax(torch.stack(lses), dim=0).unsqueeze(-1)
    return (weights * torch.stack(outs).float()).sum(dim=0).to(outs[0].dtype)


@dataclass(slots=True)
class Pass:
    """The shared context and the rows' own K and V of one forward pass.

    Attributes:
        k, v: the shared context `[layers, Hkv, tokens, D]`; its first `past` tokens are read.
        own_k, own_v: `[layers, B, Hkv, slots, D]`, which new keys and values are written to, or
            None.
        slots: None, or `[B]`: the one new token of each row goes to its slot, and reads the slots
            up to it among the first `used`. With None new tokens fill the slots from 0 on.
        own_q: None, or `[layers, B, Hq, slots, D]`, which new queries are written to.
    """

    k: Tensor
    v: Tensor
    past: int
    own_k: Tensor | None = None
    own_v: Tensor | None = None
    slots: Tensor | None = None
    used: int = 0
    own_q: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Outputs `[B, Hq, n, D]` of `q` `[B, Hq, n, D]` and new `k`, `v` `[B, Hkv, n, D]`."""
        if self.own_q is not None:
            self.own_q[layer, :, :, : q.shape[2]] = q
        parts = [self._new_part(layer, q, k, v, scale)]
        if self.past:
            parts.append(self._context_part(layer, q, k.shape[1], scale))
        return merged(parts)

    def _context_part(
        self, layer: int, q: Tensor, num_kv_heads: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention to the context, with rows and query heads of a group as one sequence's queries.

        This needs no copy of the context, and no mask."""
        batch, num_heads, length, dim = q.shape
        rows = q.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)  # [Hkv, B, G, n, D]
        keys, values = (x[layer : layer + 1, :, : self.past] for x in (self.k, self.v))
        out, lse = attend_with_lse(
            rows.reshape(1, num_kv_heads, -1, dim), keys, values, scale=scale, causal=False
        )
        shape = (num_kv_heads, batch, num_heads // num_kv_heads, length)
        out = out.reshape(*shape, dim).transpose(0, 1).flatten(1, 2)
        return out, lse.reshape(shape).transpose(0, 1).flatten(1, 2)

    def _new_part(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        length, num_kv_heads = k.shape[2], k.shape[1]
        if self.slots is None:
            if self.own_k is not None and self.own_v is not None:
                self.own_k[layer, :, :, :length] = k
                self.own_v[layer, :, :, :length] = v
            group = q.shape[1] // num_kv_heads
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            return attend_with_lse(q, k, v, scale=scale, causal=True)
        assert self.own_k is not None and self.own_v is not None
        rows = torch.arange(len(q), device=q.device)
        self.own_k[layer, rows, :, self.slots] = k[:, :, 0]
        self.own_v[layer, rows, :, self.slots] = v[:, :, 0]
        keys, values = (x[layer, :, :, : self.used].float() for x in (self.own_k, self.own_v))
        queries = q.float().reshape(len(q), num_kv_heads, -1, q.shape[-1])  # [B, Hkv, G, D]
        scores = queries @ keys.transpose(-1, -2) * scale
        hidden = torch.arange(self.used, device=q.device) > self.slots[:, None, None, None]
        scores = scores.masked_fill(hidden, float("-inf"))
        out = torch.softmax(scores, dim=-1) @ values
        return out.reshape(q.shape).to(q.dtype), scores.logsumexp(-1).reshape(q.shape[:3])


def replay_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    replay_pass: Pass,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers; keys arrive after RoPE, heads unexpanded."""
    out = replay_pass.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask, because a pass knows which tokens a query sees."""
    return None


def take_over(model: Any) -> None:
    """Make every attention layer of a transformers model use the `Pass` of its forward call."""
    if model.config._attn_implementation != ATTENTION_NAME:
        AttentionInterface.register(ATTENTION_NAME, replay_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
        model.set_attn_implementation(ATTENTION_NAME)
