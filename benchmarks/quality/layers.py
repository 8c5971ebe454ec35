"""Errors of K, V and attention by layer, and the KL of sealing one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectral_paged.benchmarks.quality.journal import Journal, digest
from spectral_paged.benchmarks.quality.judge import Progress, about, judge_window, method_key
from spectral_paged.benchmarks.quality.methods import LANDMARKS, Method
from spectral_paged.benchmarks.quality.replay import Context, Replay
from spectral_paged.benchmarks.quality.summary import sensitivity_table
from spectral_paged.benchmarks.quality.tasks import Window
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.kernels.page.layout import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class OneLayer:
    """A method that seals the blocks of one layer and leaves those of all others exact."""

    inner: Method
    layer: int

    @property
    def name(self) -> str:
        return f"{self.inner.name}@{self.layer}"

    @property
    def fingerprint(self) -> str:
        return f"{method_key(self.inner)}@{self.layer}"

    @property
    def family(self) -> str:
        return self.inner.family

    @property
    def num_landmark_tokens(self) -> int:
        return self.inner.num_landmark_tokens

    @property
    def hot_tokens(self) -> int:
        return self.inner.hot_tokens

    def bytes_per_token(self, head_dim: int) -> float:
        return self.inner.bytes_per_token(head_dim)

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer == self.layer:
            return self.inner.rebuild(layer, k, v, cos, sin)
        return rotate(k, cos, sin), v


def judge_sensitivity(
    replay: Replay,
    methods: Sequence[Method],
    windows: Sequence[Window],
    *,
    journal: Journal,
    progress: Progress = print,
) -> dict[str, Any]:
    """KL of every method with only one layer sealed, each layer in turn."""
    num_layers = replay.geometry.num_layers
    records = []
    for method in methods:
        alone = [OneLayer(method, layer) for layer in range(num_layers)]
        for i, window in enumerate(windows):
            records += judge_window(replay, alone, window, journal, task="sensitivity")
            progress(f"sensitivity of {method.name}: window {i + 1}/{len(windows)}")
    return sensitivity_table(records)


def relative_error(rebuilt: Tensor, x: Tensor) -> float:
    """Frobenius norm of the difference over that of `x`."""
    return float((rebuilt - x).norm() / x.norm())


def judge_reconstruction(
    replay: Replay,
    methods: Sequence[Method],
    window: Window,
    *,
    journal: Journal,
    progress: Progress = print,
) -> dict[str, Any]:
    """Errors of K, V and attention in every layer, on the window's blocks and on random matrices.

    Random matrices have the blocks' shape and deviation but no structure. Their error only warns
    of what a benchmark on random data would report.
    """
    unit = digest("reconstruction and attention", window.context)
    waiting = [m for m in methods if journal.find(unit, method_key(m)) is None]
    if waiting:
        context = replay.prefill(list(window.context), keep_queries=True)
        head = {"task": "reconstruction", "genre": window.genre, "length": window.length}
        head_dim = replay.geometry.head_dim
        for method in waiting:
            described = {**head, **about(method, head_dim)}
            result = reconstruction_errors(replay, method, context)
            journal.write(unit, method_key(method), {**described, "result": result})
            progress(f"reconstruction errors of {method.name}")
    found = {m.name: journal.find(unit, method_key(m)) for m in methods}
    return {name: record["result"] for name, record in found.items() if record is not None}


def whole_blocks(context: Context, landmarks: int = LANDMARKS) -> tuple[int, int]:
    """The first token and the end of the whole blocks behind the landmarks."""
    blocks = (context.num_tokens - landmarks) // BLOCK_TOKENS
    return landmarks, landmarks + blocks * BLOCK_TOKENS


@torch.inference_mode()
def reconstruction_errors(replay: Replay, method: Method, context: Context) -> dict[str, Any]:
    """Relative errors of a method over the blocks of a context.

    `k`, `v`, `random_k` and `random_v` have one error a layer, of K after RoPE. `attention` has a
    list over query heads a layer, which is empty with fewer than two blocks."""
    generator = torch.Generator(device=context.k.device).manual_seed(0)
    scale = replay.softmax_scale
    errors: dict[str, Any] = {k: [] for k in ("k", "v", "random_k", "random_v", "attention")}
    for layer in range(replay.geometry.num_layers):
        blocks = replay.blocks(context, layer, *whole_blocks(context))
        noise = [
            torch.randn(x.shape, generator=generator, device=x.device) * x.std()
            for x in (blocks.k, blocks.v)
        ]
        random = replace(blocks, k=noise[0], v=noise[1])
        for prefix, part in (("", blocks), ("random_", random)):
            new_k, new_v = part.stored_by(method, layer)
            k = rotate(part.k, part.cos, part.sin)
            errors[f"{prefix}k"].append(relative_error(new_k, k))
            errors[f"{prefix}v"].append(relative_error(new_v, part.v))
            if part is blocks and blocks.q is not None:
                later = blocks.q[1:]  # each block is read by the queries of the next one
                read = attention_errors(later, (k, part.v), (new_k, new_v), scale)
                errors["attention"].append(read)
    return errors


def attention_errors(
    q: Tensor, exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], scale: float
) -> list[float]:
    """Relative error of attention from `q[n]` to block n only, by query head, mean over blocks.

    Args:
        q: `[N, H, G, Q, D]` after RoPE.
        exact, stored: keys after RoPE and values, `[N, H, 512, D]`; blocks past N are not read.
    """
    total = torch.zeros(q.shape[1] * q.shape[2], device=q.device)
    for b in range(len(q)):
        want, got = (
            torch.softmax(q[b] @ k[b].unsqueeze(1).transpose(-1, -2) * scale, dim=-1)
            @ v[b].unsqueeze(1)
            for k, v in (exact, stored)
        )
        error = (got - want).square().sum((-2, -1)) / want.square().sum((-2, -1))
        total += error.sqrt().flatten()
    return (total / len(q)).tolist() if len(q) else []
