"""Deterministic tokens for a SpectralKVCache, and the outputs that it must return."""

from __future__ import annotations

import torch

from spectral_paged.cache import SpectralKVCache
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable
from support.reference import PlainCache

LAYERS, HQ, H, D = 2, 6, 2, 16
ROPE = RotaryTable.from_theta(10000.0, D, max_positions=6000)


def fmt(name="spectral-int8", segment=512, **kw):
    base = PageFormat.preset(name, num_kv_heads=H, head_dim=D, prefill_segment=segment)
    return PageFormat(**{**{f: getattr(base, f) for f in base.__dataclass_fields__}, **kw})


def make(format=None, **kw):
    kw = {
        "kv_cache_bytes": 12 << 20,
        "max_num_seqs": 8,
        "max_model_len": 4000,
        "debug_poison": True,
    } | kw
    return SpectralKVCache(
        num_layers=LAYERS,
        num_q_heads=HQ,
        num_kv_heads=H,
        head_dim=D,
        rope=ROPE,
        format=format or fmt(),
        **kw,
    )


def slots_of(cache, seq_id, place=0):
    """The slots of a sequence in the layer group at index `place`."""
    return cache._sequences.by_id[seq_id].slots[place]


class Feed:
    """Deterministic q, k, v of a sequence: a function of its seed, layer and position."""

    def __init__(self, seed, length):
        g = torch.Generator().manual_seed(seed)
        mix = torch.randn(LAYERS, 2, H, 6, D, generator=g)
        low = torch.randn(LAYERS, 2, length, H, 6, generator=g)
        kv = torch.einsum("lsthr,lshrd->lsthd", low, mix)
        kv = kv + 0.1 * torch.randn(kv.shape, generator=g)
        self.q = torch.randn(LAYERS, length, HQ, D, generator=g)
        self.k = torch.stack([ROPE.apply(x, torch.arange(length)) for x in kv[:, 0]])
        self.v = kv[:, 1]


def drive(cache, feeds, prompts, totals, token_ids=None, pins=None):
    """Run sequences to their totals in one batch; outputs [layers, total, HQ, D] by name.

    Sequences that are in the cache already continue from their last token.
    """
    outs = {s: torch.full((LAYERS, totals[s], HQ, D), float("nan")) for s in feeds}
    for s in feeds:
        if s in cache:
            continue
        cached = cache.add_sequence(
            s,
            num_prompt_tokens=prompts[s],
            token_ids=None if token_ids is None else token_ids[s],
            pinned_spans=() if pins is None else pins[s],
        )
        assert cached is not None
    while any(cache.num_tokens(s) < totals[s] for s in feeds):
        want = {}
        for s in feeds:
            done = cache.num_tokens(s)
            if done < totals[s]:
                end = prompts[s] if done < prompts[s] else done + 1
                want[s] = min(end - done, cache.chunk_limit(s))
        plan = cache.reserve(want)
        assert plan is not None
        cache.begin_step(plan)
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat(
                    [
                        getattr(feeds[e.seq_id], x)[layer, e.start : e.start + e.num_new]
                        for e in plan.entries
                    ]
                )
                for x in "qkv"
            )
            out = cache.attend(layer, q, k, v)
            flat = 0
            for e in plan.entries:
                outs[e.seq_id][layer, e.start : e.start + e.num_new] = out[flat : flat + e.num_new]
                flat += e.num_new
        report = cache.end_step()
        assert not report.failed
        cache.check_integrity()
    return outs


def expected(feed, format, prompt, total, layer, basis=None, pins=()):
    """Outputs `[T, HQ, D]` that the queries of a layer must get; `basis` is a bound one."""
    plain = PlainCache(format, ROPE, prompt, D**-0.5, basis, layer, pins)
    return plain.attend(feed.q[layer, :total], feed.k[layer, :total], feed.v[layer, :total])


class NoEncoder:
    """An encoder that writes nothing: pages hold what was there."""

    backend = "none"

    def warm_up(self, planes):
        pass

    def seal(self, planes, exact, pages, first):
        return torch.zeros(len(exact), LAYERS, H, 2, dtype=torch.int32)
