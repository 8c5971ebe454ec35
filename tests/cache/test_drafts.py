"""Tokens that a step computes and takes back: nothing of the cache shows that they were there."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.errors import FormatError, PoolError
from support.cache_feed import LAYERS, Feed, drive, fmt, make

MOST = 7
PROMPTS = {"a": 60, "b": 575, "c": 1, "d": 1090}
TOTALS = {"a": 135, "b": 660, "c": 70, "d": 1165}
WINDOWS = {"none": None, "short": 100, "both": [100, 1500]}
FEEDS = {name: Feed(seed, 1300) for seed, name in enumerate(PROMPTS)}
WRONG = Feed(99, 1300)
IDS = {name: [seed * 7 + i % 50 for i in range(1300)] for seed, name in enumerate(PROMPTS)}


def opened(windows, **options):
    return make(fmt(segment=512), sliding_windows=WINDOWS[windows], **options)


def left_behind(cache):
    """What a cache has used, and how much of each sequence it finds once all are freed."""
    names = ("pages_in_use", "exact_pages_in_use", "pages_sealed")
    used = [cache.stats()[name] for name in names]
    for name in PROMPTS:
        cache.free(name)
    for name, ids in IDS.items():
        length = PROMPTS[name] + 1
        used.append(cache.add_sequence(f"{name}2", num_prompt_tokens=length, token_ids=ids))
    cache.check_integrity()
    return used


@functools.cache
def wanted(windows):
    """The outputs of a cache that computes one token a step, and what is left behind there."""
    cache = opened(windows)
    return drive(cache, FEEDS, PROMPTS, TOTALS, IDS), left_behind(cache)


def step(cache, lengths, drafts, check):
    """Compute new tokens, the last `drafts[name]` of them wrong, and take these back."""
    plan = cache.reserve(lengths)
    assert plan is not None
    names = [name for name in lengths if cache.num_tokens(name) >= PROMPTS[name]]
    plan = cache.plan(lengths, names)
    cache.begin_step(plan)
    for layer in range(LAYERS):
        parts = {"q": [], "k": [], "v": []}
        for e in plan.entries:
            good = e.num_new - drafts.get(e.seq_id, 0)
            for kind, found in parts.items():
                span = slice(e.start, e.start + good), slice(e.start + good, e.start + e.num_new)
                found.append(getattr(FEEDS[e.seq_id], kind)[layer, span[0]])
                found.append(getattr(WRONG, kind)[layer, span[1]])
        out = cache.attend(layer, *(torch.cat(parts[kind]) for kind in "qkv"))
        flat = 0
        for e in plan.entries:
            good = e.num_new - drafts.get(e.seq_id, 0)
            check(e.seq_id, layer, e.start, out[flat : flat + good])
            flat += e.num_new
    cache.take_back(drafts)
    assert not cache.end_step().failed
    cache.check_integrity()


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.randoms(use_true_random=False))
@pytest.mark.parametrize("windows", WINDOWS)
def test_taken_back_tokens_change_no_output(windows, data):
    """Behind exact pages that they filled, blocks that they made due, windows that they moved."""
    (want, left_there), cache = wanted(windows), opened(windows)

    def check(name, layer, start, got):
        exact = want[name][layer, start : start + len(got)]
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)

    for name, prompt in PROMPTS.items():
        cache.add_sequence(name, num_prompt_tokens=prompt, token_ids=IDS[name])
    left = set(PROMPTS)
    while left:
        lengths, drafts = {}, {}
        for name in sorted(left):
            done = cache.num_tokens(name)
            if done < PROMPTS[name]:
                lengths[name] = min(PROMPTS[name] - done, cache.chunk_limit(name))
                continue
            good = 1 + data.randint(0, MOST)
            bad = data.randint(0, MOST + 1 - good)
            most = min(cache.chunk_limit(name), TOTALS[name] - done)
            lengths[name] = min(good + bad, most)
            drafts[name] = max(0, lengths[name] - good)
        step(cache, lengths, drafts, check)
        left -= {name for name in left if cache.num_tokens(name) >= TOTALS[name]}
    assert left_behind(cache) == left_there


def test_a_step_that_is_dropped_with_its_drafts_leaves_nothing():
    cache = opened("none")
    drive(cache, {"a": FEEDS["a"]}, PROMPTS, {"a": 62}, IDS)
    before = cache.stats()["exact_pages_in_use"]
    for _ in range(2):
        assert cache.reserve({"a": 8}) is not None
        cache.begin_step(cache.plan({"a": 8}, ["a"]))
        cache.take_back({"a": 3})
        cache.abort_step()
        cache.check_integrity()
        assert cache.num_tokens("a") == 62 and cache.stats()["exact_pages_in_use"] == before


@pytest.mark.parametrize(
    "counts, says",
    [({"b": 1}, "'b' has no draft"), ({"a": 8}, "8 tokens of 'a'"), ({"a": -1}, "-1")],
)
def test_what_is_no_draft_is_not_taken_back(counts, says):
    cache = opened("none")
    drive(cache, {n: FEEDS[n] for n in "ab"}, PROMPTS, {"a": 62, "b": 580}, IDS)
    with pytest.raises(PoolError, match="take_back outside"):
        cache.take_back(counts)
    assert cache.reserve({"a": 8, "b": 1}) is not None
    cache.begin_step(cache.plan({"a": 8, "b": 1}, ["a"]))
    with pytest.raises(PoolError, match=says):
        cache.take_back(counts)


def test_drafts_are_refused_where_views_go_by_step():
    prompts = {"a": 60}
    cache = make(fmt(segment=0), enable_prefix_caching=False)
    drive(cache, {"a": FEEDS["a"]}, prompts, {"a": 62})
    assert cache.reserve({"a": 8}) is not None
    with pytest.raises(FormatError, match="drafts need a format with a prefill_segment"):
        cache.plan({"a": 8}, ["a"])
    exact = make(fmt("exact", segment=0), enable_prefix_caching=False)
    drive(exact, {"a": FEEDS["a"]}, prompts, {"a": 62})
    assert exact.reserve({"a": 8}) is not None and exact.plan({"a": 8}, ["a"]).is_decode
