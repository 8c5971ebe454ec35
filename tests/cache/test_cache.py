"""SpectralKVCache against PlainCache: residues, batching, prefixes, forks, errors."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.errors import FormatError, PoolError
from support.cache_feed import HQ, LAYERS, D, Feed, drive, expected, fmt, make

FORMATS = {
    "int8-512": fmt(),
    "int8-2048": fmt(segment=2048),
    "post": fmt("spectral-int8-post"),
    "no-landmarks": fmt(num_landmark_tokens=0),
    "no-hot": fmt(hot_tokens=0),
    "no-mean": fmt(mean=False),
    "exact": fmt("exact"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 575, 576, 577, 1152, 1217, 2200])
def test_attention_follows_the_written_rule_at_every_residue(name, prompt):
    format = FORMATS[name]
    total = prompt + 3
    feed = Feed(prompt, total)
    out = drive(make(format), {"a": feed}, {"a": prompt}, {"a": total})["a"]
    for layer in range(LAYERS):
        want = expected(feed, format, prompt, total, layer)
        assert torch.allclose(out[layer], want, atol=2e-4, rtol=2e-4)


def test_decode_crosses_a_block_border_and_the_page_is_really_read():
    format = fmt()
    prompt, total = 630, 650
    feed = Feed(1, total)
    cache = make(format)
    out = drive(cache, {"a": feed}, {"a": prompt}, {"a": total})["a"]
    assert cache.stats()["pages_sealed"] == LAYERS
    assert cache.stats()["pages_attended"] == LAYERS * (total - 640)
    want = expected(feed, format, prompt, total, 0)
    assert torch.allclose(out[0], want, atol=2e-4, rtol=2e-4)
    exact = expected(feed, fmt("exact"), prompt, total, 0)
    assert not torch.allclose(out[0, 640:], exact[640:], atol=1e-5), "pages are lossy"
    assert torch.allclose(out[0, :640], exact[:640], atol=2e-4), "before the seal nothing is lost"


def test_a_sequence_computes_the_same_alone_and_in_a_batch():
    format = fmt()
    prompts = {"a": 1300, "b": 64, "c": 700, "d": 1}
    totals = {s: n + 5 for s, n in prompts.items()}
    feeds = {s: Feed(i, totals[s]) for i, s in enumerate(prompts)}
    together = drive(make(format), feeds, prompts, totals)
    for s in feeds:
        alone = drive(make(format), {s: feeds[s]}, prompts, totals)[s]
        error = (alone - together[s]).norm() / alone.norm()
        assert error < 1e-5


def test_exempt_layers_stay_exact_beside_spectral_ones():
    format = fmt()
    feed = Feed(5, 1300)
    out = drive(make(format, exempt_layers=[0]), {"a": feed}, {"a": 1290}, {"a": 1300})["a"]
    exact = expected(feed, fmt("exact"), 1290, 1300, 0)
    assert torch.allclose(out[0], exact, atol=2e-4, rtol=2e-4)
    want = expected(feed, format, 1290, 1300, 1)
    assert torch.allclose(out[1], want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["int8-512", "int8-2048", "exact", "no-landmarks"])
@pytest.mark.parametrize("shared", [63, 640, 1217, 1920])
def test_a_prefix_hit_changes_nothing_but_the_work(name, shared):
    format = FORMATS[name]
    length = 2000
    first, second = Feed(1, length + 2), Feed(2, length + 2)
    for x in "qkv":
        getattr(second, x)[:, :shared] = getattr(first, x)[:, :shared]
    ids = list(range(length + 2))
    other = ids[:shared] + [t + 10**6 for t in ids[shared:]]
    cache = make(format)
    drive(cache, {"a": first}, {"a": length}, {"a": length + 2}, {"a": ids})
    cache.free("a")
    out = drive(cache, {"b": second}, {"b": length}, {"b": length + 2}, {"b": other})["b"]
    hit = int(cache.sequence_stats("b")["cached_tokens"])
    assert hit <= shared and hit == shared // 64 * 64
    want = expected(second, format, length, length + 2, 1)
    assert torch.allclose(out[1, hit:], want[hit:], atol=2e-4, rtol=2e-4)


def test_another_salt_never_shares():
    cache = make()
    ids = list(range(700))
    drive(cache, {"a": Feed(1, 700)}, {"a": 700}, {"a": 700}, {"a": ids})
    assert cache.add_sequence("b", num_prompt_tokens=700, token_ids=ids, cache_salt="x") == 0
    assert cache.add_sequence("c", num_prompt_tokens=700, token_ids=ids) > 0


def test_generated_spans_are_found_by_a_resume_and_not_by_another_prompt():
    cache = make()
    ids = list(range(900))
    drive(cache, {"a": Feed(1, 900)}, {"a": 600}, {"a": 900}, {"a": ids})
    cache.free("a")
    assert cache.add_sequence("resumed", num_prompt_tokens=600, token_ids=ids) > 640
    assert cache.add_sequence("other", num_prompt_tokens=900, token_ids=ids) <= 600


def test_a_fork_shares_full_slots_and_copies_the_partial_page():
    format = fmt()
    feed = Feed(3, 1400)
    cache = make(format)
    drive(cache, {"a": feed}, {"a": 1250}, {"a": 1255})
    used = cache.stats()["exact_pages_in_use"]
    assert cache.fork("a", "b")
    assert cache.stats()["exact_pages_in_use"] == used + LAYERS
    cache.check_integrity()
    other = Feed(9, 1400)
    for x in "qkv":
        getattr(other, x)[:, :1255] = getattr(feed, x)[:, :1255]
    for s, f in (("a", feed), ("b", other)):
        plan = cache.reserve({s: 1})
        cache.begin_step(plan)
        for layer in range(LAYERS):
            at = slice(1255, 1256)
            out = cache.attend(layer, f.q[layer, at], f.k[layer, at], f.v[layer, at])
            want = expected(f, format, 1250, 1256, layer)[1255:]
            assert torch.allclose(out, want, atol=2e-4, rtol=2e-4)
        cache.end_step()
    cache.free("a")
    cache.free("b")
    cache.check_integrity()


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_fails_its_own_sequence_only_and_names_the_place(side, value):
    """In K or in V alone: each is looked at."""
    cache = make()
    feeds = {"bad": Feed(1, 640), "good": Feed(2, 640)}
    getattr(feeds["bad"], side)[1, 300, 1, 3] = float(value)
    for s in feeds:
        cache.add_sequence(s, num_prompt_tokens=640)
    outs = {}
    report = None
    while cache.num_tokens("good") < 640:
        left = 640 - cache.num_tokens("good")
        plan = cache.reserve({s: min(left, cache.chunk_limit(s)) for s in feeds})
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
            outs[layer] = cache.attend(layer, q, k, v)
        report = cache.end_step()
    assert list(report.failed) == ["bad"]
    where = f"{side.upper()} of sequence 'bad' has NaN or Inf in layer 1, head 1, block 0"
    assert str(report.failed["bad"]).startswith(where)
    with pytest.raises(PoolError, match="failed"):
        cache.try_reserve("bad", 1)
    cache.free("bad")
    cache.check_integrity()
    assert cache.sequence_stats("good")["pages_sealed"] == LAYERS


def test_a_chunk_behind_a_history_and_a_fresh_one_attend_in_one_step():
    cache, feeds = make(), {"a": Feed(1, 500), "b": Feed(2, 300)}
    for spans in ({"a": (0, 300)}, {"a": (300, 500), "b": (0, 300)}):
        cache.begin_step(cache.reserve({s: end - start for s, (start, end) in spans.items()}))
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([getattr(feeds[s], x)[layer, slice(*span)] for s, span in spans.items()])
                for x in "qkv"
            )
            out = cache.attend(layer, q, k, v)
        cache.end_step()
    first = expected(feeds["a"], fmt(), 500, 500, layer)[300:]
    second = expected(feeds["b"], fmt(), 300, 300, layer)
    torch.testing.assert_close(out, torch.cat([first, second]), atol=2e-4, rtol=2e-4)


def test_reserve_that_does_not_fit_holds_nothing():
    cache = make(kv_cache_bytes=900_000)
    before = cache.stats()["exact_pages_in_use"]
    assert cache.reserve({"a": 500, "b": 500, "c": 500, "d": 500, "e": 500}) is None
    assert cache.stats()["exact_pages_in_use"] == before and "a" not in cache
    cache.check_integrity()


def test_a_chunk_across_a_change_of_view_is_refused_with_the_limit():
    cache = make()
    cache.add_sequence("a", num_prompt_tokens=3000)
    with pytest.raises(ValueError, match="at most 1088"):
        cache.try_reserve("a", 1089)


def test_expanded_kv_heads_are_refused():
    cache = make()
    cache.begin_step(cache.reserve({"a": 3}))
    x = torch.zeros(3, HQ, D)
    with pytest.raises(FormatError, match="unexpanded"):
        cache.attend(0, x, x, x)


def test_double_free_raises():
    cache = make()
    cache.reserve({"a": 3})
    cache.free("a")
    with pytest.raises(PoolError, match="double free"):
        cache.free("a")


@pytest.mark.parametrize("format", [fmt(), fmt("exact")], ids=lambda f: f.name)
def test_token_ids_that_come_late_publish_nothing_wrong(format):
    """Exact pages that were replaced before their ids were known can not be found any more."""
    total = 720  # past the seal of a block
    feed, ids, cache = Feed(1, total), list(range(10)), make(format)
    run = ({"a": feed}, {"a": 10}, {"a": total}, {"a": ids})
    drive(cache, run[0], run[1], {"a": total - 1}, run[3])
    ids += range(10, total)
    drive(cache, *run)
    cache.free("a")
    out = drive(cache, *run)["a"]
    hit = int(cache.sequence_stats("a")["cached_tokens"])
    want = expected(feed, format, 10, total, 1)
    assert torch.allclose(out[1, hit:], want[hit:], atol=2e-4, rtol=2e-4)


def test_children_of_a_parent_without_token_ids_publish_what_is_still_exact():
    length = 1300
    feed, ids, cache = Feed(1, length + 2), list(range(length + 2)), make()
    drive(cache, {"a": feed}, {"a": length}, {"a": length})
    assert cache.fork("a", "b", token_ids=ids)
    assert cache.fork("a", "c", token_ids=ids, cache_salt="other")
    prompts, totals = (dict.fromkeys("bc", n) for n in (length, length + 2))
    drive(cache, {"b": feed, "c": feed}, prompts, totals)
    for s in "abc":
        cache.free(s)
        cache.check_integrity()
    out = drive(cache, {"d": feed}, {"d": length}, {"d": length + 2}, {"d": ids})["d"]
    hit = int(cache.sequence_stats("d")["cached_tokens"])
    want = expected(feed, fmt(), length, length + 2, 1)
    assert torch.allclose(out[1, hit:], want[hit:], atol=2e-4, rtol=2e-4)
