"""The decay of singular values of real keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_paged.benchmarks.quality.journal import BASELINE, Journal, digest
from spectral_paged.benchmarks.quality.judge import Progress
from spectral_paged.benchmarks.quality.layers import whole_blocks
from spectral_paged.benchmarks.quality.replay import Replay
from spectral_paged.benchmarks.quality.tasks import Window
from spectral_paged.kernels.math.rotary import rotate

RANKS = (4, 8, 16, 32, 64)
SIDES = ("k_pre", "k_post", "v")


def decay(x: Tensor) -> dict[str, Any]:
    """The energy of blocks `[N, H, 512, D]` by component, with the block mean removed.

    `left[r]` is the share of energy beyond r components, `effective_rank` the exponential of the
    spectrum's entropy (Roy and Vetterli 2007), `spectrum` the mean share of every component.
    """
    x = x.double()
    x = x - x.mean(dim=-2, keepdim=True)
    energy = torch.linalg.eigvalsh(x.transpose(-1, -2) @ x).flip(-1).clamp_min(0)
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1)
    spectrum = share.mean(dim=(0, 1))
    left = (1 - spectrum.cumsum(-1)).clamp_min(0).tolist()
    return {
        "left": {str(r): left[r - 1] for r in RANKS if r < x.shape[-1]},
        "effective_rank": float(entropy.exp().mean()),
        "spectrum": [float(f"{s:.4g}") for s in spectrum.tolist()],
    }


@torch.inference_mode()
def judge_spectra(
    replay: Replay, window: Window, *, journal: Journal, progress: Progress = print
) -> dict[str, Any]:
    """The decay in every layer, of keys before and after RoPE and of values."""
    unit = digest("spectra", window.context)
    if (record := journal.find(unit, BASELINE)) is None:
        context = replay.prefill(list(window.context))
        result: dict[str, Any] = {side: [] for side in SIDES}
        for layer in range(replay.geometry.num_layers):
            blocks = replay.blocks(context, layer, *whole_blocks(context))
            rotated = rotate(blocks.k, blocks.cos, blocks.sin)
            for side, x in zip(SIDES, (blocks.k, rotated, blocks.v), strict=True):
                result[side].append(decay(x))
        head = {"task": "spectra", "method": BASELINE, "length": window.length}
        record = journal.write(unit, BASELINE, {**head, "genre": window.genre, "result": result})
        progress(f"singular values of {window.genre} {window.length}")
    return dict(record["result"])
