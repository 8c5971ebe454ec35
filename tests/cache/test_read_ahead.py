"""The prefixes of waiting requests come into slots that the pool can spare, and leave no trace."""

from __future__ import annotations

import gc
import time
import weakref

import pytest

from spectral_paged.cache import load, read_ahead
from support.cache_feed import Feed, drive, make
from support.late_copies import LateCopier
from support.stored_prompts import IDS, PROMPT, host_of, loading, ready, warm_cache


def test_slots_on_their_way_give_way_to_a_running_sequence():
    cache = warm_cache(kv_cache_bytes=900_000)
    cache.add_sequence("c", num_prompt_tokens=1800)
    loading(cache)
    assert cache._lower.moves.ahead._loads
    drive(cache, {"c": Feed(2, 1800)}, {"c": 1800}, {"c": 1800})
    assert not cache._lower.moves.ahead._loads and not any(group.borrowed for group in cache.groups)
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


def test_a_load_takes_a_bounded_amount_of_the_devices_memory(monkeypatch):
    """Copies come through a buffer there, and a prefix may have any length."""
    cache = warm_cache()
    monkeypatch.setattr(load, "MAX_BYTES_ON_WAY", 100_000)
    loading(cache)
    for _ in range(5):
        assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT) is False
    (only,) = cache._lower.moves.ahead._loads.values()
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
    assert len(cache._lower.moves.ahead._loads) == read_ahead.MAX_LOADS
    assert cache.prefetch("x", num_prompt_tokens=1800, token_ids=[7, *PROMPT[1:]]) is True
    cache.cancel_prefetch("b")
    assert len(cache._lower.moves.ahead._loads) == read_ahead.MAX_LOADS - 1
    loading(cache, "f")
    assert "f" in cache._lower.moves.ahead._loads


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


def prefetched(cache, seq_id="b"):
    """Admit a request once its prefix is there; its tokens, and those from host memory."""
    ready(cache, seq_id, 1800, PROMPT)
    hit = cache.add_sequence(seq_id, num_prompt_tokens=1800, token_ids=PROMPT)
    return hit, cache.sequence_stats(seq_id)["host_cached_tokens"]


def test_a_request_whose_first_chunk_finds_no_room_says_all_the_same_where_its_prefix_was():
    cache = warm_cache()
    assert prefetched(cache) == (1600, 1600)
    cache.free("b")  # as a scheduler does that could not reserve the chunk
    assert prefetched(cache) == (1600, 1600)
    drive(cache, {"b": Feed(1, 1800)}, {"b": 1800}, {"b": 1800})
    cache.free("b")
    assert prefetched(cache)[1] == 0, "it is the pool's by now"


def test_a_load_that_gave_way_says_where_its_first_part_came_from(monkeypatch):
    """The second load finds that part in the pool."""
    cache = warm_cache()
    monkeypatch.setattr(load, "MAX_BYTES_ON_WAY", 1)
    host_of(cache)._copier = LateCopier(most=1)
    ahead = cache._lower.moves.ahead
    while not (ahead._loads and ahead._loads["b"].came):
        assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT) is False
    assert cache._lower.give_way()
    cache._lower.moves.ahead.room_made()
    assert prefetched(cache) == (1600, 1600)


def test_what_a_load_that_gave_way_had_read_is_of_the_disk_though_memory_has_it_by_then(
    monkeypatch, tmp_path
):
    how = {"kv_store": tmp_path, "kv_store_size": 32 << 20, "model_fingerprint": "digits"}
    warm_cache(**how).close()
    cache = make(kv_host_memory=8 << 20, **how)
    with monkeypatch.context() as patch:
        patch.setattr(load, "MAX_BYTES_ON_WAY", 0)  # nothing goes on from host memory
        ahead, ends = cache._lower.moves.ahead, time.monotonic() + 30
        while not (ahead._loads and all(s.copy.is_done for *_, s in ahead._loads["b"]._coming)):
            assert cache.prefetch("b", num_prompt_tokens=1800, token_ids=PROMPT) is False
            assert time.monotonic() < ends
            time.sleep(0.001)
        assert not ahead._loads["b"].came
        assert cache._lower.give_way()
        ahead.room_made()
    assert prefetched(cache) == (1600, 0)
    assert cache.sequence_stats("b")["disk_cached_tokens"] == 1600
    cache.close()


@pytest.mark.parametrize("how", ["reset", "cancel"])
def test_slots_that_come_free_otherwise_than_by_an_end_are_asked_for_again(how):
    """A sequence runs, so nothing else would ask."""
    cache = warm_cache(kv_cache_bytes=900_000)
    cache.add_sequence("c", num_prompt_tokens=64)
    drive(cache, {"c": Feed(2, 64)}, {"c": 64}, {"c": 64})
    loading(cache)
    if how == "reset":
        cache.reset_prefix_cache()
        again = "b"
    else:
        assert cache.prefetch("d", num_prompt_tokens=1800, token_ids=PROMPT) is None
        cache.cancel_prefetch("b")
        again = "d"
    assert cache.prefetch(again, num_prompt_tokens=1800, token_ids=PROMPT) is False
    cache.check_integrity()
