"""The history of an open step is the K and V that its queries see, for other attention code."""

from __future__ import annotations

from torch import Tensor

from spectral_paged.cache.cache import SpectralKVCache
from spectral_paged.cache.index import Chunk, chunk_batches
from spectral_paged.errors import PoolError


def read_history(cache: SpectralKVCache, layer: int) -> list[tuple[Tensor, Tensor]]:
    """K and V of one layer for each sequence of the open step, with pages rebuilt.

    Both are `[Hkv, tokens, D]` in the cache's dtype, with the step's own tokens (appended already)
    at the end. With a window, tokens that left it are missing at the start. Keys are after RoPE.

    Raises:
        PoolError: no step is open.
    """
    if cache.open_step is None:
        raise PoolError("read_history outside begin_step / end_step")
    place, group = next((i, g) for i, g in enumerate(cache.groups) if layer in g.layers)
    chunks, flat = [], 0
    step = cache.open_step
    for entry, state in zip(step.plan.entries, step.sequences.states, strict=True):
        slots = state.slots[place]
        runs = slots.runs(entry.start + entry.num_new)  # by position, unlike those of attention
        chunks.append(Chunk(flat, entry.num_new, slots.row, runs))
        flat += entry.num_new
    found = []
    shared = cache.attention.basis.rows(layer)
    for batch in chunk_batches(chunks, flat, cache.device):
        batch = batch.located(group)
        keys, values = cache.attention.history(group, batch, group.plane(layer), shared)
        if group.rope is not None:
            keys = group.rope.pairs(keys)
        found += [(keys[:, span], values[:, span]) for _, span in batch.spans]
    return found
