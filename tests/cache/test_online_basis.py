"""A cache whose pages share a basis, from a calibration or learnt from its first blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.cache import SpectralKVCache
from spectral_paged.errors import FormatError
from spectral_paged.kernels.math.rotary import rotate, stored_keys
from spectral_paged.pages import BasisAccumulator
from support.cache_feed import HQ, LAYERS, ROPE, D, Feed, H, drive, expected, fmt, make
from support.page_parts import toy_basis
from support.tiny_model import random_prompts, tiny_format, tiny_llm

SHARED = {"basis": "shared", "k_bands": ((16, 4),), "v_bands": ((16, 3),), "gain": True}


def shared(**kw):
    return fmt(**(SHARED | kw))


def close(a, b):
    return torch.allclose(a, b, atol=2e-4, rtol=2e-4)


def basis_of(feeds, format):
    """The calibration that the first blocks of `feeds` make, block 0 of each."""
    span = torch.arange(64, 576)
    cos, sin = ROPE.cos[span], ROPE.sin[span]
    accumulator = BasisAccumulator(LAYERS, H, D)
    for feed in feeds:
        k, v = (x[:, span].transpose(1, 2) for x in (feed.k, feed.v))
        plain = rotate(k, cos, sin, inverse=True)
        frame = stored_keys(k, cos, sin, "frame")
        accumulator.add(range(LAYERS), k_pre=plain, k_frame=frame, k_post=k, v=v)
    plain = torch.eye(D).expand(LAYERS, H, D, D)
    basis = accumulator.finish(q_pre=plain, q_post=plain, o=plain, model_fingerprint="online")
    return basis.bind(format)


# ---- a calibration that is given ---------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope": "post", "outlier_slots": 3},
        {"dim_weighting": "calibrated", "band_rotation": True},
        {"basis": "page", "dim_weighting": "diagonal"},
    ],
)
def test_attention_over_calibrated_pages_follows_the_written_rule(changes):
    calibration = toy_basis(LAYERS, H, D)
    format = shared(**changes)
    bound = calibration.bind(format)
    cache = make(format, calibration=calibration)
    assert cache.format == bound.format and cache.stats()["fingerprint"] != format.fingerprint
    feeds = {"a": Feed(1, 1300), "b": Feed(2, 700)}
    out = drive(cache, feeds, {"a": 1290, "b": 640}, {"a": 1300, "b": 650})
    assert cache.stats()["pages_attended"] > 0
    for s, prompt, total in (("a", 1290, 1300), ("b", 640, 650)):
        for layer in range(LAYERS):
            want = expected(feeds[s], bound.format, prompt, total, layer, bound)
            assert close(out[s][layer], want)


def test_exempt_layers_leave_the_others_their_own_rows():
    calibration = toy_basis(LAYERS, H, D)
    bound = calibration.bind(shared())
    feed = Feed(4, 1300)
    cache = make(shared(), calibration=calibration, exempt_layers=[0])
    out = drive(cache, {"a": feed}, {"a": 1290}, {"a": 1300})["a"]
    assert close(out[1], expected(feed, bound.format, 1290, 1300, 1, bound))
    assert close(out[0], expected(feed, fmt("exact"), 1290, 1300, 0))


@pytest.mark.parametrize("calibration", [None, "auto"])
def test_a_cache_without_the_calibration_it_needs_is_refused_with_the_command(calibration):
    for changes in ({}, {"basis": "page", "dim_weighting": "calibrated"}):
        with pytest.raises(FormatError, match="spectral-paged calibrate MODEL"):
            make(shared(**changes), calibration=calibration)


def test_a_format_that_needs_none_takes_no_calibration():
    plain = fmt()
    for calibration in (None, "online", toy_basis(LAYERS, H, D)):
        assert make(plain, calibration=calibration).format == plain


@pytest.mark.parametrize("shape", [(LAYERS, H + 1, D), (LAYERS - 1, H, D), (LAYERS + 1, H, D)])
def test_the_calibration_of_other_heads_or_layers_is_refused(shape):
    with pytest.raises(FormatError, match="calibrate the model that runs"):
        make(shared(), calibration=toy_basis(*shape))


def test_a_format_bound_to_another_calibration_is_refused():
    bound = toy_basis(LAYERS, H, D, seed=3).bind(shared()).format
    with pytest.raises(FormatError, match="bound to calibration"):
        make(bound, calibration=toy_basis(LAYERS, H, D))


# ---- online ------------------------------------------------------------------------------


def test_weights_and_named_calibrations_cannot_be_taken_online():
    bound = toy_basis(LAYERS, H, D).bind(shared()).format
    for format in (shared(dim_weighting="calibrated"), bound):
        with pytest.raises(FormatError, match="real calibration"):
            make(format, calibration="online")


@pytest.mark.parametrize("rope", ["pre", "frame", "post"])
def test_the_first_seal_freezes_the_basis_and_nothing_else_changes_it(rope):
    """Pages of sequences that came before it and after it are those of the bound format."""
    format = shared(rope=rope)
    cache = make(format, calibration="online")
    seen = [cache.format.fingerprint]
    feeds = {s: Feed(i, 1300) for i, s in enumerate("abcd")}

    def run(names, prompts, totals):
        out = drive(cache, {s: feeds[s] for s in names}, prompts, totals)
        seen.append(cache.format.fingerprint)
        return out

    run("d", {"d": 500}, {"d": 500})
    assert seen[-1] == format.fingerprint, "nothing was sealed yet"
    out = run("ab", {"a": 640, "b": 640}, {"a": 700, "b": 700})
    bound = basis_of([feeds["a"], feeds["b"]], format)
    assert cache.format == bound.format and cache.stats()["fingerprint"] != format.fingerprint
    out |= run("c", {"c": 1290}, {"c": 1300})
    assert len(set(seen)) == 2 and cache.stats()["pages_sealed"] == 4 * LAYERS
    for s, prompt, total in (("a", 640, 700), ("b", 640, 700), ("c", 1290, 1300)):
        for layer in range(LAYERS):
            want = expected(feeds[s], bound.format, prompt, total, layer, bound)
            assert close(out[s][layer], want)
    # a sequence that was added before the freeze seals with the same basis
    for _ in range(200):
        cache.begin_step(cache.reserve({"d": 1}))
        at = slice(cache.num_tokens("d"), cache.num_tokens("d") + 1)
        got = [
            cache.attend(x, feeds["d"].q[x, at], feeds["d"].k[x, at], feeds["d"].v[x, at])
            for x in range(LAYERS)
        ]
        assert not cache.end_step().failed
    want = expected(feeds["d"], bound.format, 500, 700, 1, bound)
    assert close(got[1], want[-1:]) and cache.format == bound.format
    cache.check_integrity()


def test_prefixes_hashed_before_the_freeze_are_not_found_and_later_ones_are_right():
    cache = make(shared(), calibration="online")
    feed, ids = Feed(1, 1300), list(range(1300))
    prompts, totals = {"a": 1290}, {"a": 1300}
    drive(cache, {"a": feed}, prompts, totals, {"a": ids})
    cache.free("a")
    bound = basis_of([feed], shared())
    assert cache.format == bound.format
    want = expected(feed, bound.format, 1290, 1300, 1, bound)
    hits = []
    for s in "bc":
        out = drive(cache, {s: feed}, {s: 1290}, {s: 1300}, {s: ids})[s]
        hits.append(int(cache.sequence_stats(s)["cached_tokens"]))
        assert close(out[1, hits[-1] :], want[hits[-1] :])
        cache.free(s)
        cache.check_integrity()
    assert hits[0] == 0 and hits[1] >= 1280 - 64


def test_a_block_with_nan_does_not_decide_the_basis():
    """Alone, it decides nothing: the next sound block does."""
    cache = make(shared(), calibration="online")
    bad, good = Feed(1, 700), Feed(2, 700)
    bad.k[1, 300, 1, 3] = float("nan")

    def prefill(name, feed):
        cache.add_sequence(name, num_prompt_tokens=640)
        while (done := cache.num_tokens(name)) < 640:
            new = min(640 - done, cache.chunk_limit(name))
            cache.begin_step(cache.reserve({name: new}))
            for layer in range(LAYERS):
                cache.attend(layer, *(getattr(feed, x)[layer, done : done + new] for x in "qkv"))
            report = cache.end_step()
        return report

    assert list(prefill("bad", bad).failed) == ["bad"]
    assert cache.format == shared(), "nothing sound was sealed"
    cache.free("bad")
    assert not prefill("good", good).failed
    assert cache.format == basis_of([good], shared()).format
    cache.check_integrity()


def test_online_without_rope_shares_a_basis_of_keys_as_they_came():
    cache = SpectralKVCache(
        num_layers=1,
        num_q_heads=HQ,
        num_kv_heads=H,
        head_dim=D,
        rope=None,
        format=shared(rope="post"),
        kv_cache_bytes=4 << 20,
        max_num_seqs=2,
        max_model_len=1000,
        calibration="online",
    )
    x = Feed(1, 700)
    cache.add_sequence("a", num_prompt_tokens=640)
    while (done := cache.num_tokens("a")) < 640:
        new = min(640 - done, cache.chunk_limit("a"))
        cache.begin_step(cache.reserve({"a": new}))
        cache.attend(0, *(getattr(x, name)[0, done : done + new] for name in "qkv"))
        cache.end_step()
    assert cache.stats()["pages_sealed"] == 1 and cache.format.basis_id


# ---- generation --------------------------------------------------------------------------


def test_generation_with_an_online_basis_repeats_itself_with_and_without_hits():
    params = SamplingParams(temperature=0.0, max_tokens=10)
    llm = tiny_llm(replace(tiny_format(), **SHARED), calibration="online")
    start = llm.stats()["fingerprint"]
    prompts = random_prompts([1300, 64, 700, 1217])

    def run():
        out = llm.generate(prompts, params, use_tqdm=False)
        llm.cache.check_integrity()
        return [o.outputs[0].token_ids for o in out], [o.metrics.num_cached_tokens for o in out]

    run()
    frozen = llm.stats()["fingerprint"]
    assert frozen != start
    cold, _ = run()
    warm, cached = run()
    llm.cache.reset_prefix_cache()
    again, none = run()
    assert cold == warm == again
    assert min(c for c, p in zip(cached, prompts) if len(p) > 64) >= 640 and not any(none)
    assert llm.stats()["fingerprint"] == frozen and llm.stats()["pages_attended"] > 0
