"""The memory of a cache's pages can be given back for a while, and taken again."""

from __future__ import annotations

import torch

from spectral_paged.cache.cache import SpectralKVCache
from spectral_paged.errors import PoolError


def give_memory_back(cache: SpectralKVCache) -> None:
    """Forget what is cached, and free the memory of all pages. Tiers below the pool stay.

    Graphs that read the pages are not valid any more.

    Raises:
        PoolError: sequences are held.
    """
    if cache.num_sequences:
        raise PoolError(f"the cache holds {cache.num_sequences} sequences: free them first")
    cache.settle()
    cache.reset_prefix_cache()
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)  # no copy to host memory reads a page any more
    for group in cache.groups:
        group.arena.give_back()
    if cache.device.type == "cuda":
        torch.cuda.empty_cache()  # so that other programs have it


def take_memory_again(cache: SpectralKVCache) -> None:
    """Allocate the pages that `give_memory_back` freed; they are all free."""
    for group in cache.groups:
        group.arena.allocate()
