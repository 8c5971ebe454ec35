"""What sequences seal reaches host memory: whole, once, a bounded amount at a time."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.cache import write_behind
from spectral_paged.store import host_tier
from support import cache_feed
from support.cache_feed import Feed, drive, fmt, make
from support.late_copies import LateCopier
from support.stored_prompts import FORMATS, IDS, LENGTH, PROMPT, host_of, ready


def test_a_common_beginning_is_kept_once_two_prompts_have_it():
    """The third prompt goes on where the first two part."""
    cache = make(kv_host_memory=8 << 20)
    hits = []
    for i in range(3):
        ids = IDS[:1300] + [5000 + i] * 500
        assert ready(cache, "s", 1800, ids)
        hits.append(cache.add_sequence("s", num_prompt_tokens=1800, token_ids=ids))
        feed = Feed(i, 1800)  # what a token holds plays no part here
        drive(cache, {"s": feed}, {"s": 1800}, {"s": 1800})
        cache.free("s")
        cache.reset_prefix_cache()
    assert hits == [0, 0, 1088]


def test_blocks_with_nan_are_not_kept():
    """Those of a sequence in the same steps are."""
    cache = make(kv_host_memory=8 << 20)
    ids = {"a": IDS[:1300], "b": [9, *IDS[:1299]]}
    chains = {}
    for name in ids:
        cache.add_sequence(name, num_prompt_tokens=1300, token_ids=ids[name])
        chains[name] = cache._sequences.by_id[name].chain
    failed = {}
    for count in (576, 512, 212):
        need = {name: count for name in ids if name not in failed}
        cache.begin_step(cache.reserve(need))
        for layer in range(cache_feed.LAYERS):
            k, v = torch.randn(2, sum(need.values()), cache_feed.H, cache_feed.D)
            k[100] = float("nan") if not failed else 1.0  # of "a"
            cache.append(layer, k, v)
        failed |= cache.end_step().failed
        for name in failed.keys() & need.keys():
            cache.free(name)
    cache.free("b")
    assert failed.keys() == {"a"}
    records, host = cache._lower.moves.behind._records, host_of(cache)
    kept = {name: records.run(chains[name], 0, ()).key in host for name in ids}
    assert kept == {"a": False, "b": True}


def test_forgetting_a_sequence_reaches_host_memory():
    cache = make(kv_host_memory=8 << 20)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    assert host_of(cache).stats()["records"]
    cache.free("a", forget=True)
    assert host_of(cache).stats()["records"] == 0


@pytest.mark.parametrize("name", ["int8-512", "exact"])
@pytest.mark.parametrize("most", [1, 3])
def test_a_prompt_of_more_bytes_than_may_be_on_their_way_is_kept_whole(monkeypatch, name, most):
    """What has to wait is written by later steps."""
    cache = make(FORMATS[name](), kv_host_memory=8 << 20)
    monkeypatch.setattr(host_tier, "MAX_BYTES_ON_WAY", 60_000)
    host_of(cache)._copier = LateCopier(most=most)
    drive(cache, {"a": Feed(1, LENGTH)}, {"a": 1800}, {"a": LENGTH}, {"a": PROMPT})
    cache.free("a")
    assert host_of(cache).counters.dropped == 0
    cache.reset_prefix_cache()
    assert ready(cache, "b", 1800, PROMPT)
    assert cache.add_sequence("b", num_prompt_tokens=1800, token_ids=PROMPT) >= 1600


def test_a_prompt_that_ends_before_it_is_written_is_written_when_the_next_comes(monkeypatch):
    cache, num_runs = make(fmt("exact"), kv_host_memory=8 << 20), 1800 // 64
    monkeypatch.setattr(host_tier, "MAX_BYTES_ON_WAY", 60_000)
    host = host_of(cache)
    host._copier = LateCopier()
    host._copier.random.randint = lambda a, b: 10**9
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    cache.free("a")
    assert 0 < host.counters.written < num_runs
    for _ in range(num_runs):
        host.wait()
        assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT)
    assert host.counters.written == num_runs and not host.counters.dropped


def test_what_waits_to_be_written_is_bounded(monkeypatch):
    cache = make(kv_host_memory=8 << 20)
    monkeypatch.setattr(write_behind, "MAX_NOTED", 1)
    monkeypatch.setattr(host_tier, "MAX_BYTES_ON_WAY", 0)
    names = {"a": PROMPT, "b": [9, *PROMPT[1:]]}
    lengths = dict.fromkeys(names, 1800)
    drive(cache, {n: Feed(1, 1800) for n in names}, lengths, lengths, names)
    assert len(cache._lower.moves.behind._noted) == 1
    assert host_of(cache).counters.dropped == 2, "each of them once"


def test_a_step_asks_nothing_of_a_prompt_that_is_written(monkeypatch):
    cache = make(kv_host_memory=8 << 20)
    drive(cache, {"a": Feed(1, LENGTH)}, {"a": 1800}, {"a": 1870}, {"a": PROMPT})
    monkeypatch.setattr(cache._lower.moves.behind, "_complete_runs", None)
    drive(cache, {"a": Feed(1, LENGTH)}, {"a": 1800}, {"a": LENGTH})
