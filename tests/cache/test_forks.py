"""A fork goes on as its parent would, and neither sees what the other stores."""

from __future__ import annotations

import copy

import pytest
import torch

from spectral_paged.cache.sealer import SealCheck
from spectral_paged.errors import PoolError
from support.cache_feed import Feed, drive, fmt, make

KINDS = {
    "int8": {},
    "exact": {"format": fmt("exact")},
    "window": {"sliding_windows": 200},
    "sealed window": {"sliding_windows": [1100, None]},
}


def parted(feed, length, seed):
    """The tokens of `feed`, and others from position `length` on."""
    found, other = copy.copy(feed), Feed(seed, feed.q.shape[1])
    for name in "qkv":
        both = getattr(feed, name)[:, :length], getattr(other, name)[:, length:]
        setattr(found, name, torch.cat(both, dim=1))
    return found


@pytest.mark.parametrize("length", [1, 63, 64, 65, 640, 700, 1100, 1281, 1730])
@pytest.mark.parametrize("kind", KINDS)
def test_parent_and_child_go_on_apart(kind, length):
    total, prompt = length + 70, max(1, length - 30)
    feed = Feed(1, total)
    after = {"a": parted(feed, length, 2), "b": parted(feed, length, 3)}
    cache = make(**KINDS[kind])
    drive(cache, {"a": feed}, {"a": prompt}, {"a": length})
    assert cache.fork("a", "b")
    cache.check_integrity()
    both = dict.fromkeys("ab", prompt), dict.fromkeys("ab", total)
    outs = drive(cache, after, *both)
    alone = make(**KINDS[kind])
    want = drive(alone, after, *both)
    for name in "ab":
        got = outs[name][:, length:]
        torch.testing.assert_close(got, want[name][:, length:], atol=2e-4, rtol=2e-4)
        assert (
            cache.sequence_stats(name)["pages_sealed"] <= alone.sequence_stats(name)["pages_sealed"]
        )
    cache.free("a")
    cache.check_integrity()
    cache.free("b")
    assert cache.stats()["exact_pages_in_use"] == cache.stats()["pages_in_use"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sealed_before_a_fork_is_not_sealed_again(kind):
    """Also where a block was sealed ahead of the query that sees it as a page."""
    feed = Feed(1, 1150)
    cache = make(**KINDS[kind])
    drive(cache, {"a": feed}, {"a": 560}, {"a": 600})
    before = cache.sequence_stats("a")["pages_sealed"]
    assert cache.fork("a", "b")
    drive(cache, {"a": feed, "b": feed}, dict.fromkeys("ab", 560), dict.fromkeys("ab", 1150))
    ends = {s: cache.sequence_stats(s)["pages_sealed"] for s in "ab"}
    assert ends["a"] == before + ends["b"]
    assert cache.stats()["pages_sealed"] == ends["a"] + ends["b"]


def test_a_fork_of_pinned_tokens_publishes_nothing_for_prompts_without_pins():
    """The child's later tokens saw the pinned block exactly; others may see it as a page."""
    ids, feed, cache = list(range(900)), Feed(1, 900), make()
    lengths = {"z": 700}, {"z": 700}
    drive(cache, {"z": feed}, *lengths, {"z": ids[:700]})
    drive(cache, {"a": feed}, {"a": 700}, {"a": 700}, {"a": ids[:700]}, {"a": [(100, 200)]})
    assert cache.fork("a", "b", token_ids=ids)
    drive(cache, {"b": feed}, {"b": 900}, {"b": 900})
    assert cache.add_sequence("c", num_prompt_tokens=700, token_ids=ids) == 640
    cache.check_integrity()


def test_a_fork_that_is_freed_before_its_parents_nan_is_known_is_found_by_nobody(monkeypatch):
    """As on CUDA, where a check is known later than the step that sealed."""
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: False))
    ids, feed, cache = list(range(1100)), Feed(1, 1100), make()
    feed.v[0, 300] = float("nan")
    drive(cache, {"a": feed}, {"a": 1100}, {"a": 1088}, {"a": ids})
    assert cache.num_tokens("a") == 1088 and not cache.has_late_failures
    assert cache.fork("a", "b", token_ids=ids)
    cache.free("b")
    assert list(cache.settle().failed) == ["a"]
    assert cache.add_sequence("c", num_prompt_tokens=1100, token_ids=ids) == 0


def test_a_fork_that_does_not_fit_holds_nothing():
    cache = make(max_num_seqs=2)
    drive(cache, {"a": Feed(1, 90)}, {"a": 90}, {"a": 90})
    used = cache.stats()["exact_pages_in_use"]
    pool = cache.groups[0].arena.slots
    allocate = pool.allocate
    pool.allocate = lambda kind: None
    for _ in range(3):
        assert not cache.fork("a", "b"), "its partial page finds no slot"
        assert "b" not in cache and cache.stats()["exact_pages_in_use"] == used
        cache.check_integrity()
    pool.allocate = allocate
    assert cache.fork("a", "b") and not cache.fork("a", "c"), "no row is left"
    with pytest.raises(PoolError, match="held already"):
        cache.fork("a", "b")
    cache.check_integrity()
