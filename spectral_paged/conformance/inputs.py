"""Synthetic K and V for tests of speed and arithmetic; they do not measure quality."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectral_paged.cache import SpectralKVCache
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.models.calibration import fingerprint_of
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import BasisAccumulator, BoundBasis, PageFormat, SharedBasis


def structured_blocks(
    count: int, format: PageFormat, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return K and V with a decaying spectrum, an offset and outlier tokens.

    Both are fp32 `[count, H, 512, D]`.
    """
    generator = torch.Generator(device=device).manual_seed(1)
    shape = (2, count, format.num_kv_heads, BLOCK_TOKENS, format.head_dim)
    decay = torch.logspace(0.5, -1.5, format.head_dim, device=device)
    x = torch.randn(shape, generator=generator, device=device) * decay
    x = x + 3 * torch.randn((2, 1, shape[2], 1, shape[4]), generator=generator, device=device)
    x[..., 7, :] *= 6
    return x[0], x[1]


class MadeUpTokens:
    """Stores synthetic K and V in place of a model's, for measurements that need no real values.

    All layers get the same few blocks, repeated.
    """

    def __init__(self, cache: SpectralKVCache) -> None:
        self.cache = cache
        k, v = structured_blocks(4, cache.format, cache.device)
        # [tokens, H, D]
        self._k, self._v = (x.transpose(1, 2).flatten(0, 1).to(cache.dtype) for x in (k, v))

    def append(self, count: int) -> None:
        """Store `count` tokens, those of the cache's open step, in every layer."""
        rows = torch.arange(count, device=self.cache.device) % len(self._k)
        k, v = self._k[rows], self._v[rows]
        for layer in range(self.cache.num_layers):
            self.cache.append(layer, k, v)


def toy_basis(
    format: PageFormat,
    blocks: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int,
) -> SharedBasis:
    """Return a calibration of `num_layers` equal layers from the first of `blocks`.

    The default is a structured block. The moments of queries and outputs are identities.
    """
    heads, dim = format.num_kv_heads, format.head_dim
    k, v = structured_blocks(1, format, "cpu") if blocks is None else blocks
    accumulator = BasisAccumulator(num_layers, heads, dim)
    first_k, first_v = (x[:1].expand(num_layers, -1, -1, -1) for x in (k, v))
    keys = {f"k_{rope}": first_k for rope in ("pre", "frame", "post")}
    accumulator.add(range(num_layers), v=first_v, **keys)
    plain = torch.eye(dim).expand(num_layers, heads, -1, -1)
    return accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="toy")


def toy_calibration(format: PageFormat, k: Tensor, v: Tensor, *, num_layers: int = 1) -> BoundBasis:
    """Return a `toy_basis` bound to `format` on the device of `k`."""
    return toy_basis(format, (k, v), num_layers=num_layers).bind(format, k.device)


def random_calibration(format: PageFormat, loaded: LoadedModel) -> SharedBasis | str:
    """Return a calibration from synthetic K and V, or `auto` for formats that need none."""
    if not format.needs_calibration:
        return "auto"
    basis = toy_basis(format, num_layers=loaded.geometry.num_layers)
    return replace(basis, model_fingerprint=fingerprint_of(loaded))
