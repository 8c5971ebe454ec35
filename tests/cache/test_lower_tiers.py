"""A cache's prompts come back from host memory with the outputs that they had."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.cache import SpectralKVCache
from spectral_paged.errors import CapacityError, InvalidRequestError
from spectral_paged.pages import PageFormat
from spectral_paged.pool.slot_pool import SlotKind
from spectral_paged.rope import RotaryTable
from support import cache_feed
from support.cache_feed import Feed, drive, make
from support.late_copies import LateCopier
from support.stored_prompts import FORMATS, IDS, LENGTH, PROMPT, host_of, ready, warm_cache


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_comes_back_with_the_outputs_that_it_had(name):
    """The pool has lost it; what is behind the hit is the same as in a cold run."""
    feed, cache = Feed(1, LENGTH), make(FORMATS[name](), kv_host_memory=8 << 20)
    cold = drive(cache, {"a": feed}, {"a": 1800}, {"a": LENGTH}, {"a": IDS})["a"]
    cache.free("a")
    cache.reset_prefix_cache()
    host_of(cache)._copier = LateCopier()
    assert ready(cache, "b", 1800, PROMPT) > 1, "it came at once"
    hit = cache.add_sequence("b", num_prompt_tokens=1800, token_ids=PROMPT)
    assert hit and hit >= 1800 - 64 - cache.format.prefill_segment
    assert cache.sequence_stats("b")["host_cached_tokens"] == hit
    warm = drive(cache, {"b": feed}, {"b": 1800}, {"b": LENGTH})["b"]
    assert torch.allclose(warm[:, hit:], cold[:, hit:], atol=1e-4)
    cache.free("b")
    cache.close()


def differ(name="spectral-int8"):
    """A cache of which one layer sees all, one a sealed window, one an exact window, and one is
    exempt."""
    return SpectralKVCache(
        num_layers=4,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rope=RotaryTable.from_theta(10000.0, 16, max_positions=2500),
        sliding_windows=[None, 1100, 130, None],
        exempt_layers=(3,) if name != "exact" else (),
        format=PageFormat.preset(name, num_kv_heads=1, head_dim=16, prefill_segment=512),
        kv_cache_bytes=4 << 20,
        max_num_seqs=3,
        kv_host_memory=4 << 20,
        debug_poison=True,
    )


def run(cache, seq_id, end, prompt):
    """K and V that are functions of the position; outputs `[layers, tokens, 2, 16]` from where the
    sequence stands."""
    outs = []
    while cache.num_tokens(seq_id) < end:
        start = cache.num_tokens(seq_id)
        stop = prompt if start < prompt else start + 1
        count = min(stop - start, cache.chunk_limit(seq_id))
        cache.begin_step(cache.reserve({seq_id: count}))
        parts = []
        for layer in range(cache.num_layers):
            g = torch.Generator().manual_seed(layer)
            q, k, v = torch.randn(3, end, 2, 16, generator=g)[:, start : start + count]
            parts.append(cache.attend(layer, q, k[:, :1], v[:, :1]))
        outs.append(torch.stack(parts))
        assert not cache.end_step().failed
        cache.check_integrity()
    return torch.cat(outs, 1)


@pytest.mark.parametrize("name", ["spectral-int8", "exact"])
def test_layers_that_differ_come_back_each_with_what_it_keeps(name):
    cache, prompt = differ(name), 2100
    assert len(cache.groups) >= 3
    ids = list(range(prompt))
    cache.add_sequence("a", num_prompt_tokens=prompt, token_ids=ids)
    cold = run(cache, "a", prompt, prompt)
    cache.free("a")
    cache.reset_prefix_cache()
    assert ready(cache, "b", prompt, ids)
    hit = cache.add_sequence("b", num_prompt_tokens=prompt, token_ids=ids)
    assert hit >= prompt - 64 - 512
    warm = run(cache, "b", prompt, prompt)
    assert torch.allclose(warm, cold[:, hit:], atol=1e-4)


@pytest.mark.parametrize("change", ["salt", "pins", "tokens"])
def test_another_prompt_finds_nothing(change):
    cache = make(kv_host_memory=8 << 20)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    cache.free("a")
    cache.reset_prefix_cache()
    other = {
        "salt": {"cache_salt": "x"},
        "pins": {"pinned_spans": ((70, 80),)},
        "tokens": {},
    }[change]
    ids = PROMPT if change != "tokens" else [7, *IDS[1:1800]]
    assert ready(cache, "b", 1800, ids, **other) == 1
    assert cache.add_sequence("b", num_prompt_tokens=1800, token_ids=ids, **other) == 0


def test_pinned_blocks_come_back_exact():
    cache, pins = make(kv_host_memory=8 << 20), ((600, 700),)
    feed = Feed(1, LENGTH)
    how = {"pinned_spans": pins}
    cold = drive(cache, {"a": feed}, {"a": 1800}, {"a": 1800}, {"a": PROMPT}, pins={"a": pins})["a"]
    cache.free("a")
    cache.reset_prefix_cache()
    ready(cache, "b", 1800, PROMPT, **how)
    hit = cache.add_sequence("b", num_prompt_tokens=1800, token_ids=PROMPT, **how)
    assert hit == 1600
    warm = drive(cache, {"b": feed}, {"b": 1800}, {"b": 1800})["b"]
    assert torch.allclose(warm[:, hit:], cold[:, hit:], atol=1e-4)


def test_resetting_the_pool_keeps_the_store_and_resetting_the_store_does_not():
    cache = make(kv_host_memory=8 << 20)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    cache.free("a")
    cache.reset_prefix_cache()
    assert host_of(cache).stats()["records"]
    cache.reset_prefix_cache(reset_store=True)
    assert host_of(cache).stats()["records"] == 0
    cache.check_integrity()


def test_every_slot_of_a_hit_lies_in_one_record():
    """What a prefix hit attaches is what its runs and its anchor hold, each slot once."""
    for name in FORMATS:
        cache = make(FORMATS[name](), kv_host_memory=8 << 20)
        cache.add_sequence("a", num_prompt_tokens=1800, token_ids=PROMPT)
        drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
        state = cache._sequences.by_id["a"]
        records = cache._lower.moves.behind._records
        point = next(records.hit_points(1799))
        found = [records.run(state.chain, i, ()) for i in range(records.runs_before(point))]
        found.append(records.anchor(state.chain, point, ()))
        parts = [part.slot_key for record in found for part in record.parts]
        cache.free("a")
        hit = cache.add_sequence("b", num_prompt_tokens=1800, token_ids=[*IDS[:point], -1])
        assert hit == point
        held = cache_feed.slots_of(cache, "b")
        pool = cache.groups[0].arena.slots
        assert len(parts) == len(set(parts)) == len(held.exact) + len(held.pages)
        assert {pool.lookup(key) for key in parts} == {*held.exact, *held.pages}
        assert {kind for kind, _ in parts} <= set(SlotKind)


# ---- doors -------------------------------------------------------------------------------


def test_without_a_store_a_prefix_is_ready_at_once():
    cache = make()
    assert cache.prefetch("a", num_prompt_tokens=1800, token_ids=IDS) is True
    cache.cancel_prefetch("a")
    cache.close()
    assert cache.stats()["store_bytes"] == {"host": 0, "disk": 0}


def test_a_closed_store_keeps_nothing():
    cache = warm_cache()
    cache.close()
    cache.close()
    assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT) is True
    drive(cache, {"b": Feed(1, 1800)}, {"b": 1800}, {"b": 1800}, {"b": PROMPT})
    cache.free("b")


@pytest.mark.parametrize(
    "how, error, words",
    [
        ({"kv_host_memory": 1000}, CapacityError, "at least [0-9]+"),
        ({"kv_host_memory": "1KiB"}, CapacityError, "at least [0-9]+"),
        ({"kv_host_memory": "much"}, InvalidRequestError, "kv_host_memory.*16GiB"),
        ({"kv_host_memory": 0}, InvalidRequestError, "kv_host_memory is 0"),
        ({"kv_host_memory": 1.5}, InvalidRequestError, "kv_host_memory is 1.5"),
        (
            {"kv_host_memory": 1 << 20, "enable_prefix_caching": False},
            InvalidRequestError,
            "enable_prefix_caching",
        ),
        ({"kv_host_memory": 1 << 20, "max_model_len": 300}, CapacityError, "max_model_len 300"),
    ],
)
def test_what_cannot_be_served_is_refused(how, error, words):
    with pytest.raises(error, match=words):
        make(**how)
