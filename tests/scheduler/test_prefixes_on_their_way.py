"""Requests whose prefixes are loaded: others pass, seats and places in the queue are kept."""

from __future__ import annotations

from support.counting_cache import CountingCache, request, scheduler


def test_a_request_whose_prefix_is_on_its_way_lets_others_pass_and_keeps_its_place():
    cache = CountingCache(100)
    cache.prefetched = {"a": False}
    s = scheduler(cache, [request("a", 16), request("b", 24), request("c", 1)], max_num_seqs=4)
    out = s.schedule()
    assert list(out.new_tokens) == ["b", "c"] and out.num_loading == 1
    cache.step(out)
    s.add(request("d", 3))
    del cache.prefetched["a"]
    out = s.schedule()
    assert list(out.new_tokens)[-2:] == ["a", "d"] and out.num_loading == 0
    assert not s.waiting


def test_requests_on_their_way_count_as_seats():
    cache = CountingCache(100)
    cache.prefetched = {"a": False, "b": False}
    s = scheduler(cache, [request(x, 8) for x in "abcd"], max_num_seqs=3)
    out = s.schedule()
    assert list(out.new_tokens) == ["c"] and [r.request_id for r in s.waiting] == ["a", "b", "d"]


def test_a_prefix_without_room_stops_admission():
    """A newer request must not take the room that the older one waits for."""
    cache = CountingCache(100)
    cache.prefetched = {"b": None}
    s = scheduler(cache, [request(x, 8) for x in "abc"])
    assert list(s.schedule().new_tokens) == ["a"]


def test_a_prefix_on_its_way_resets_no_cached_slots():
    cache = CountingCache(100)
    cache.prefetched = {"a": False}
    s = scheduler(cache, [request("a", 8)])
    assert s.schedule().num_loading == 1 and cache.num_resets == 0
    cache.prefetched = {"a": None}
    assert s.schedule().num_loading == 0 and cache.num_resets == 1


def test_a_waiting_request_that_ends_gives_its_prefix_up():
    cache = CountingCache(100)
    cache.prefetched = {"a": False}
    waiting = request("a", 8)
    s = scheduler(cache, [waiting])
    s.schedule()
    s.finish(waiting)
    assert cache.prefetched == {} and not s.has_unfinished


def test_a_request_that_computes_its_prompt_waits_for_no_prefix():
    cache = CountingCache(100)
    cache.prefetched = {"a": False}
    computed = request("a", 8)
    computed.max_cached_tokens = 0
    assert list(scheduler(cache, [computed]).schedule().new_tokens) == ["a"]
