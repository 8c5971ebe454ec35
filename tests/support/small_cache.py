"""A cache of two layers with a calibrated format, and K and V to feed it on any device."""

from __future__ import annotations

import torch

from spectral_paged import PageFormat, SpectralKVCache
from spectral_paged.cache import cache as cache_module
from spectral_paged.kernels.ops import TorchOps
from spectral_paged.kernels.seal.triton.seal import supports
from spectral_paged.rope import RotaryTable
from support.kernel_cases import PAGES
from support.page_parts import toy_basis

HEADS, DIM = 1, 64


def small_cache(
    monkeypatch=None,
    op=None,
    *,
    device="cpu",
    dtype=torch.float32,
    calibration=None,
    **changes,
):
    """A cache of 4 MiB for four sequences; `changes` are fields of its format.

    `calibration` replaces a toy one, and `op` the seal kernel of the device."""
    fields = PAGES["quality-64"][1] | changes
    format = PageFormat("t", HEADS, DIM, num_landmark_tokens=64, **fields)
    if op is not None:
        ops = TorchOps()
        ops.seal_kernel = lambda layout: op if supports(layout) else None
        monkeypatch.setattr(cache_module, "page_ops", lambda device: ops)
    return SpectralKVCache(
        num_layers=2,
        num_q_heads=2,
        num_kv_heads=HEADS,
        head_dim=DIM,
        format=format,
        rope=RotaryTable.from_theta(10000.0, DIM, max_positions=2048),
        kv_cache_bytes=4 << 20,
        max_num_seqs=4,
        calibration=calibration or toy_basis(2, HEADS, DIM),
        device=device,
        dtype=dtype,
        debug_poison=True,
    )


def feed(cache, seq_ids, count, *, spoiled=""):
    """Outputs by sequence of `count` tokens each, and the sequences that failed.

    Chunks are as long as allowed up to token 1,200, then one token a step. One key of the sequence
    `spoiled` is NaN."""
    outs, done, failed = {s: [] for s in seq_ids}, dict.fromkeys(seq_ids, 0), {}
    generator = torch.Generator().manual_seed(1)
    while any(done[s] < count and s not in failed for s in seq_ids):
        need = {
            s: 1 if done[s] >= 1200 else min(1200 - done[s], cache.chunk_limit(s))
            for s in seq_ids
            if done[s] < count and s not in failed
        }
        cache.begin_step(cache.reserve(need))
        total = sum(need.values())
        for layer in range(2):
            q = torch.randn(total, 2, DIM, generator=generator)
            k, v = torch.randn(2, total, HEADS, DIM, generator=generator)
            if spoiled in need and done[spoiled] == 0:
                k[list(need).index(spoiled) * need[spoiled] + 100] = float("nan")
            out = cache.attend(layer, *(x.to(cache.device) for x in (q, k, v))).cpu()
            for s, part in zip(need, out.split(list(need.values()))):
                outs[s].append(part)
        failed |= cache.end_step().failed
        for s, n in need.items():
            done[s] += n
    return {s: torch.cat(x) for s, x in outs.items()}, failed
