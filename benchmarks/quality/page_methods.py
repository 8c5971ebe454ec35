"""The package's page formats as methods, encoded and decoded by the codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_paged.benchmarks.quality.methods import NUM_QUERIES
from spectral_paged.benchmarks.quality.sources import codec_digest
from spectral_paged.errors import FormatError
from spectral_paged.kernels.math.rotary import read_keys, rotate, stored_keys
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.pages import (
    BasisAccumulator,
    BoundBasis,
    PageFormat,
    decode_pages,
    encode_pages,
)


def through_pages(
    format: PageFormat,
    basis: BoundBasis | None,
    layers: Sequence[int],
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Encode and decode blocks `[N, H, 512, D]` of `layers`; returns keys after RoPE, and values.

    `k` are keys before RoPE; `options` go to `encode_pages`."""
    keys = stored_keys(rotate(k, cos, sin), cos, sin, format.rope)
    pages = encode_pages(keys, v, format, basis=basis, layers=layers, **options)
    new_k, new_v = decode_pages(pages, format, basis=basis, layers=layers)
    return read_keys(new_k, cos, sin, format.rope), new_v


def attention_mass(queries: Tensor, keys: Tensor, *, scale: float) -> Tensor:
    """Weights of a block's tokens: the attention mass that its last queries give to each.

    Args:
        queries: `[N, G, Q, D]`, post-RoPE queries of the block's last Q tokens.
        keys: `[N, 512, D]`, post-RoPE.

    Returns:
        fp32 `[N, 512]`, mean 1, at least 0.1, because a token that those queries ignore still
        matters to later ones.
    """
    scores = queries.float() @ keys.float().unsqueeze(1).transpose(-1, -2) * scale
    num_queries = queries.shape[-2]
    column = torch.arange(BLOCK_TOKENS, device=keys.device)
    row = torch.arange(BLOCK_TOKENS - num_queries, BLOCK_TOKENS, device=keys.device)
    scores = scores.masked_fill(column > row.unsqueeze(-1), float("-inf"))
    mass = torch.softmax(scores, dim=-1).mean(dim=(1, 2))
    mass = mass / mass.mean(dim=-1, keepdim=True)
    return 0.1 + 0.9 * mass


@dataclass(frozen=True)
class PageMethod:
    """The common part of methods that store pages of one format.

    For a format that needs a calibration, `basis` is the result of `SharedBasis.bind`, and `format`
    is the one bound to it.
    """

    format: PageFormat
    basis: BoundBasis | None = None
    family: str = "spectral"

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def fingerprint(self) -> str:
        return f"{self.format.fingerprint}/{codec_digest()}"

    @property
    def num_landmark_tokens(self) -> int:
        return self.format.num_landmark_tokens

    @property
    def hot_tokens(self) -> int:
        return self.format.hot_tokens

    def bytes_per_token(self, head_dim: int) -> float:
        return self.format.page_bytes / (self.format.num_kv_heads * BLOCK_TOKENS)


@dataclass(frozen=True)
class SpectralMethod(PageMethod):
    """Pages of a format, encoded and decoded by the codec."""

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.rebuild_layers([layer] * len(k), k, v, cos, sin)

    def rebuild_layers(
        self, layers: Sequence[int], k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rebuild blocks of many layers; see `ManyLayers`."""
        return through_pages(self.format, self.basis, layers, k, v, cos, sin)


@dataclass(frozen=True)
class WeightedMethod(PageMethod):
    """Pages with own bases, with tokens weighed by the attention of the block's last queries."""

    num_queries: int = NUM_QUERIES

    @property
    def fingerprint(self) -> str:
        return f"attention/{self.format.fingerprint}/{codec_digest()}"

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise FormatError(f"{self.name} weighs by queries: use rebuild_with")

    def rebuild_with(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rebuild blocks with the weights of their last queries; see `WantsQueries`."""
        mass = attention_mass(
            queries.flatten(0, 1), rotate(k, cos, sin).flatten(0, 1), scale=k.shape[-1] ** -0.5
        )
        layers, weights = [layer] * len(k), mass.unflatten(0, k.shape[:2])
        return through_pages(self.format, self.basis, layers, k, v, cos, sin, token_weights=weights)


@dataclass(frozen=True)
class OnlineMethod(PageMethod):
    """Pages with a shared basis, learnt from the first sealed block of the context itself.

    It works with `Replay.seal` only, which passes all blocks of a layer at once, in order.
    """

    @property
    def fingerprint(self) -> str:
        return f"online/{self.format.fingerprint}/{codec_digest()}"

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads, dim = k.shape[1], k.shape[-1]
        accumulator = BasisAccumulator(1, heads, dim)
        first = rotate(k[:1], cos[:1], sin[:1])
        turned = stored_keys(first, cos[:1], sin[:1], "frame")
        accumulator.add([0], k_pre=k[:1], k_frame=turned, k_post=first, v=v[:1])
        plain = torch.eye(dim).expand(1, heads, dim, dim)
        basis = accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="online")
        bound = basis.bind(self.format, k.device)
        return through_pages(bound.format, bound, [0] * len(k), k, v, cos, sin)
