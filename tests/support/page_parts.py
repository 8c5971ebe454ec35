"""Toy blocks and calibrations, and the sections of pages, for tests of formats and bytes."""

from __future__ import annotations

import torch

from spectral_paged.kernels.page.view import side_view, slot_tokens
from spectral_paged.pages import BasisAccumulator


def toy_blocks(count, heads, dim, *, rank=6, seed=0, noise=0.1):
    """Low-rank blocks with noise and an offset, `[count, heads, 512, dim]` twice."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(2, count, heads, 512, rank, generator=g)
    x = low @ torch.randn(2, count, heads, rank, dim, generator=g)
    x = x + noise * torch.randn(x.shape, generator=g)
    x = x + torch.randn(2, count, heads, 1, dim, generator=g)
    return x[0], x[1]


def toy_metric(layers, heads, dim, seed=0):
    """Second moments `[layers, heads, dim, dim]`: symmetric, of energies that differ by dim."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, heads, 2 * dim, dim, generator=g) * torch.logspace(0.5, -0.5, dim)
    return x.mT @ x


def toy_basis(layers, heads, dim, *, q=None, o=None, seed=0, model="toy"):
    """A calibration from two random blocks a layer, with random moments of queries and outputs."""
    accumulator = BasisAccumulator(layers, heads, dim)
    for i in range(2):
        pre, v = toy_blocks(layers, heads, dim, rank=dim, seed=100 + 2 * seed + i)
        post, _ = toy_blocks(layers, heads, dim, rank=dim, seed=200 + 2 * seed + i)
        frame, _ = toy_blocks(layers, heads, dim, rank=dim, seed=400 + 2 * seed + i)
        accumulator.add(range(layers), k_pre=pre, k_frame=frame, k_post=post, v=v)
    metrics = [toy_metric(layers, heads, dim, seed=300 + 3 * seed + i) for i in range(3)]
    return accumulator.finish(
        q_pre=metrics[0] if q is None else q,
        q_post=metrics[1] if q is None else q,
        o=metrics[2] if o is None else o,
        model_fingerprint=model,
    )


def sections(pages, format):
    """Views of every section that the format has, in the order of the bytes."""
    found = []
    for side in "kv":
        view = side_view(pages, format.layout, side)
        for band in view.bands:
            found += [band.plane, band.high, band.basis]
        found += [view.scale, view.gain, view.mean, view.slots]
    if format.outlier_slots:
        found.append(slot_tokens(pages, format.layout))
    return [x for x in found if x is not None]
