"""Other encoders may be chosen for a cache that is made already."""

from __future__ import annotations

from collections.abc import Callable

from spectral_paged.cache.cache import SpectralKVCache
from spectral_paged.cache.encoder import Encoder


def replace_encoders(cache: SpectralKVCache, choose: Callable[[Encoder], Encoder]) -> None:
    """Replace every encoder of `cache` by `choose(encoder)`, for measurements that need pages
    faster than they are encoded."""
    encoders = cache.sealer.encoders
    encoders.update({group: choose(encoder) for group, encoder in encoders.items()})
