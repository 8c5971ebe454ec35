"""Errors at a fact's own tokens, weighed by attention or not: synthetic needles and real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_paged.benchmarks.quality.journal import Journal, digest
from spectral_paged.benchmarks.quality.judge import Progress, about, method_key
from spectral_paged.benchmarks.quality.layers import attention_errors, whole_blocks
from spectral_paged.benchmarks.quality.methods import NUM_QUERIES, Method
from spectral_paged.benchmarks.quality.replay import Blocks, Replay
from spectral_paged.benchmarks.quality.summary import mean
from spectral_paged.benchmarks.quality.tasks import Haystack, needle_probes
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.kernels.page.layout import BLOCK_TOKENS

NUM_NEEDLES = 8
BACKGROUND_DECAY = 0.85  # ratio of a singular value to the one before it
GROUP = 2
SHARPNESS = 8.0  # score of the needle's key under a query that looks for it


def synthetic(num_heads: int, head_dim: int, device: torch.device) -> tuple[Blocks, Tensor]:
    """Blocks with a decaying spectrum and one token a block in a direction of its own.

    Every second query looks for that token. Keys need no rotation. Returns the blocks and a mask of
    the needles, bool `[NUM_NEEDLES, 512]`.
    """
    g = torch.Generator().manual_seed(0)
    shape = (NUM_NEEDLES, num_heads, BLOCK_TOKENS, head_dim)
    strength = BACKGROUND_DECAY ** torch.arange(head_dim)
    sides = []
    for _ in range(2):
        turn = torch.linalg.qr(torch.randn(*shape[:2], head_dim, head_dim, generator=g)).Q
        sides.append(torch.randn(shape, generator=g) * strength @ turn)
    rows = torch.arange(NUM_NEEDLES)
    place = torch.randint(BLOCK_TOKENS - NUM_QUERIES, (NUM_NEEDLES,), generator=g)
    for x in sides:
        needles = torch.randn(NUM_NEEDLES, num_heads, head_dim, generator=g)
        loudness = x.norm(dim=-1).mean(dim=-1, keepdim=True)  # no louder than the others
        x[rows, :, place] = needles / needles.norm(dim=-1, keepdim=True) * loudness
    k, v = sides
    wanted = k[rows, :, place]  # [N, H, D]
    looking = wanted * (SHARPNESS * head_dim**0.5 / wanted.square().sum(-1, keepdim=True))
    q = torch.randn(NUM_NEEDLES, num_heads, GROUP, BLOCK_TOKENS, head_dim, generator=g)
    q[..., ::2, :] = looking[:, :, None, None]
    cos = torch.ones(NUM_NEEDLES, 1, BLOCK_TOKENS, head_dim // 2)
    is_needle = torch.zeros(NUM_NEEDLES, BLOCK_TOKENS, dtype=torch.bool)
    is_needle[rows, place] = True
    k, v, cos, q, is_needle = (x.to(device) for x in (k, v, cos, q, is_needle))
    return Blocks(k, v, cos, torch.zeros_like(cos), q), is_needle


def errors(
    method: Method, layer: int, blocks: Blocks, is_needle: Tensor, q: Tensor, scale: float
) -> dict[str, float]:
    """Relative errors of K and V at needles and at all tokens, and of attention from `q`.

    `is_needle` is bool `[N, 512]`; `read` is the mean of `attention_errors`."""
    new_k, new_v = blocks.stored_by(method, layer)
    k = rotate(blocks.k, blocks.cos, blocks.sin)
    found = {}
    for side, new, x in (("k", new_k, k), ("v", new_v, blocks.v)):
        wrong, energy = (y.square().sum((1, 3)) for y in (new - x, x))  # [N, 512]
        found[f"{side}_needle"] = float((wrong[is_needle].sum() / energy[is_needle].sum()).sqrt())
        found[f"{side}_all"] = float((wrong.sum() / energy.sum()).sqrt())
    found["read"] = mean(attention_errors(q, (k, blocks.v), (new_k, new_v), scale)) or 0.0
    return found


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(r[key] for r in rows) / len(rows) for key in rows[0]}


@torch.inference_mode()
def judge_needle_tokens(
    replay: Replay,
    methods: Sequence[Method],
    hay: Haystack,
    length: int,
    *,
    journal: Journal,
    progress: Progress = print,
) -> dict[str, Any]:
    """Judge every method on synthetic needles, and on a real context with eight facts in it.

    `read` is an error of attention to a block: from the queries that look for its needle if
    synthetic, from the next block's queries in the real context, mean over layers and heads.
    """
    probe = next(p for p in needle_probes(hay, [length], 0) if len(p.questions) == NUM_NEEDLES)
    unit = digest("needle tokens", probe.context)
    results = {}
    g, device = replay.geometry, replay.model.device
    for method in methods:
        if (record := journal.find(unit, method_key(method))) is None:
            blocks, is_needle = synthetic(g.num_kv_heads, g.head_dim, device)
            assert blocks.q is not None
            q = blocks.q[..., ::2, :][..., -NUM_QUERIES // 2 :, :]
            found = errors(method, 0, blocks, is_needle, q, g.head_dim**-0.5)
            context = replay.prefill(list(probe.context), keep_queries=True)
            start, end = whole_blocks(context)
            is_needle = torch.zeros(end, dtype=torch.bool, device=device)
            for question in probe.questions:
                is_needle[question.start : question.end] = True
            is_needle = is_needle[start:].unflatten(0, (-1, BLOCK_TOKENS))
            layers = []
            for layer in range(g.num_layers):
                blocks = replay.blocks(context, layer, start, end)
                assert blocks.q is not None
                later = blocks.q[1:]
                layers.append(errors(method, layer, blocks, is_needle, later, replay.softmax_scale))
            head = {"task": "needle-tokens", "genre": probe.genre, "length": length}
            result = {"synthetic": found, "real": average(layers)}
            described = {**head, **about(method, g.head_dim), "result": result}
            record = journal.write(unit, method_key(method), described)
            progress(f"errors at needles of {method.name}")
        results[method.name] = record["result"]
    return results
