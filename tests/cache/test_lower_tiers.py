"""A cache's prompts come back from host memory with the outputs that they had."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from spectral_paged.cache import SpectralKVCache, load, lower_tiers
from spectral_paged.errors import CapacityError, InvalidRequestError
from spectral_paged.pages import PageFormat
from spectral_paged.pool.slot_pool import SlotKind
from spectral_paged.rope import RotaryTable
from spectral_paged.store import host_tier
from support import cache_feed
from support.cache_feed import Feed, drive, fmt, make
from support.late_copies import LateCopier

LENGTH = 1900
IDS = list(range(LENGTH))
PROMPT = IDS[:1800]
FORMATS = {
    "int8-512": lambda: fmt(),
    "int8-1024": lambda: fmt(segment=1024),
    "bare": lambda: fmt(num_landmark_tokens=0, hot_tokens=0),
    "hot": lambda: fmt(hot_tokens=640),
    "exact": lambda: fmt("exact"),
}


def host_of(cache):
    return cache._lower.tiers[0]


def ready(cache, seq_id, prompt, ids, **how):
    """Ask for a prefix until it is there; the number of questions."""
    for asked in range(1, 1000):
        if cache.prefetch(seq_id, num_prompt_tokens=prompt, token_ids=ids, **how):
            return asked
        cache.check_integrity()
    raise AssertionError("it never comes")


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
    records, host = cache._lower._records, host_of(cache)
    kept = {name: records.run(chains[name], 0, ()).key in host for name in ids}
    assert kept == {"a": False, "b": True}


def test_forgetting_a_sequence_reaches_host_memory():
    cache = make(kv_host_memory=8 << 20)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    assert host_of(cache).stats()["records"]
    cache.free("a", forget=True)
    assert host_of(cache).stats()["records"] == 0


def test_resetting_the_pool_keeps_the_store_and_resetting_the_store_does_not():
    cache = make(kv_host_memory=8 << 20)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    cache.free("a")
    cache.reset_prefix_cache()
    assert host_of(cache).stats()["records"]
    cache.reset_prefix_cache(reset_store=True)
    assert host_of(cache).stats()["records"] == 0
    cache.check_integrity()


# ---- room --------------------------------------------------------------------------------


def loading(cache, seq_id="b"):
    """Begin a load of IDS that stays on its way."""
    copier = host_of(cache)._copier = LateCopier()
    copier.random.randint = lambda a, b: 10**9
    assert cache.prefetch(seq_id, num_prompt_tokens=1800, token_ids=PROMPT) is False


def warm_cache(**how):
    cache = make(kv_host_memory=8 << 20, **how)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
    cache.free("a")
    cache.reset_prefix_cache()
    return cache


def test_slots_on_their_way_give_way_to_a_running_sequence():
    cache = warm_cache(kv_cache_bytes=900_000)
    cache.add_sequence("c", num_prompt_tokens=1800)
    loading(cache)
    assert cache._lower._loads
    drive(cache, {"c": Feed(2, 1800)}, {"c": 1800}, {"c": 1800})
    assert not cache._lower._loads and not any(group.borrowed for group in cache.groups)
    again = cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT)
    assert again is None, "before a sequence ends there is no more room"
    cache.free("c")
    assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT) is False
    cache.cancel_prefetch("b")
    cache.check_integrity()
    stats = cache.stats()
    assert stats["pages_in_use"] == stats["exact_pages_in_use"] == 0


def test_slots_on_their_way_follow_the_pools_moves():
    """A slab is emptied by moving slots together while bytes come into them."""
    cache = warm_cache()
    loading(cache)
    (group,) = cache.groups
    (borrowed,) = group.borrowed
    slots, arena = group.arena.slots, group.arena
    moves = {}
    for slot in list(borrowed.slots):
        kind = slots.kind_of(slot)
        target = slots.allocate(kind)
        moves[slot] = (kind, target)
    group._follow_moves([(kind, s, t) for s, (kind, t) in moves.items()])
    assert borrowed.slots == [target for _, target in moves.values()]
    for kind, slot in ((k, t) for k, t in moves.values()):
        assert not (arena.span(slot, kind) == 0xFF).all(), "bytes that came later were lost"


def test_a_load_that_is_cancelled_leaves_nothing():
    cache = warm_cache()
    loading(cache)
    assert cache.stats()["pages_in_use"] + cache.stats()["exact_pages_in_use"] > 0
    cache.cancel_prefetch("b")
    cache.cancel_prefetch("unknown")
    cache.check_integrity()
    assert cache.stats()["pages_in_use"] + cache.stats()["exact_pages_in_use"] == 0
    assert not any(group.borrowed for group in cache.groups)


def test_a_copy_that_fails_lets_the_prompt_be_computed():
    cache = warm_cache()
    host_of(cache)._copier = LateCopier(failing=1.0)
    assert ready(cache, "b", 1800, PROMPT)
    assert cache.add_sequence("b", num_prompt_tokens=1800, token_ids=PROMPT) == 0
    assert cache.stats()["store_failures"] == {"host": 1, "disk": 0}
    assert cache.sequence_stats("b")["host_cached_tokens"] == 0
    cache.check_integrity()


def test_a_request_of_another_prompt_may_take_the_name_of_one_that_waits():
    cache = warm_cache()
    other = [3, *IDS[:1799]]
    assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=other)
    assert ready(cache, "b", 1800, PROMPT)
    assert cache.add_sequence("b", num_prompt_tokens=1800, token_ids=PROMPT) == 1600


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
    monkeypatch.setattr(lower_tiers, "MAX_NOTED", 1)
    monkeypatch.setattr(host_tier, "MAX_BYTES_ON_WAY", 0)
    names = {"a": PROMPT, "b": [9, *PROMPT[1:]]}
    lengths = dict.fromkeys(names, 1800)
    drive(cache, {n: Feed(1, 1800) for n in names}, lengths, lengths, names)
    assert len(cache._lower._noted) == 1
    assert host_of(cache).counters.dropped == 2, "each of them once"


def test_a_load_takes_a_bounded_amount_of_the_devices_memory(monkeypatch):
    """Copies come through a buffer there, and a prefix may have any length."""
    cache = warm_cache()
    monkeypatch.setattr(load, "MAX_BYTES_ON_WAY", 100_000)
    loading(cache)
    for _ in range(5):
        assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT) is False
    (only,) = cache._lower._loads.values()
    sizes = [item.source.num_bytes for item in only._arriving]
    assert only._coming and sum(sizes[:-1]) < 100_000
    for item in only._arriving:
        item.copy.wait()
    host_of(cache)._copier = LateCopier()
    assert ready(cache, "b", 1800, PROMPT)


def test_requests_without_a_hit_do_not_wait_for_loads_of_others():
    cache = warm_cache(kv_cache_bytes=24 << 20)
    for name in "bcdef":
        loading(cache, name)
    assert len(cache._lower._loads) == lower_tiers.MAX_LOADS
    assert cache.prefetch("x", num_prompt_tokens=1800, token_ids=[7, *PROMPT[1:]]) is True
    cache.cancel_prefetch("b")
    assert len(cache._lower._loads) == lower_tiers.MAX_LOADS - 1
    loading(cache, "f")
    assert "f" in cache._lower._loads


def test_a_load_that_has_no_room_beside_another_begins_once():
    """Nothing runs, so the engine asks again and again."""
    cache = make(kv_host_memory=8 << 20, kv_cache_bytes=900_000)
    both = [[i, *PROMPT[1:]] for i in range(2)]
    for ids in both:
        drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": ids})
        cache.free("a")
    cache.reset_prefix_cache()
    copier = host_of(cache)._copier = LateCopier()
    copier.random.randint = lambda a, b: 10**9
    read = []
    for _ in range(3):
        got = [cache.prefetch(str(i), num_prompt_tokens=1800, token_ids=both[i]) for i in range(2)]
        assert got == [False, None]
        read.append(host_of(cache).counters.read)
    assert read == [read[0]] * 3
    cache.cancel_prefetch("0")
    assert cache.prefetch("1", num_prompt_tokens=1800, token_ids=both[1]) is False


class Ids(list):
    """Token ids that can be watched."""


def test_the_tokens_of_a_request_that_ran_are_not_kept():
    cache, ids = make(kv_host_memory=8 << 20), Ids(PROMPT)
    gone = weakref.ref(ids)
    assert ready(cache, "a", 1800, ids)
    drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": ids})
    cache.free("a")
    del ids
    gc.collect()
    assert gone() is None


def test_a_step_asks_nothing_of_a_prompt_that_is_written(monkeypatch):
    cache = make(kv_host_memory=8 << 20)
    drive(cache, {"a": Feed(1, LENGTH)}, {"a": 1800}, {"a": 1870}, {"a": PROMPT})
    monkeypatch.setattr(cache._lower, "_complete_runs", None)
    drive(cache, {"a": Feed(1, LENGTH)}, {"a": 1800}, {"a": LENGTH})


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


def test_every_slot_of_a_hit_lies_in_one_record():
    """What a prefix hit attaches is what its runs and its anchor hold, each slot once."""
    for name in FORMATS:
        cache = make(FORMATS[name](), kv_host_memory=8 << 20)
        cache.add_sequence("a", num_prompt_tokens=1800, token_ids=PROMPT)
        drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPT})
        state = cache._sequences.by_id["a"]
        records = cache._lower._records
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
