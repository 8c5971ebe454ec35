"""The blocks that a pinned span touches stay exact, whatever else happens."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import PageFormat, SamplingParams
from spectral_paged.cache import pinned_blocks
from spectral_paged.cache.capacity import slabs_for
from spectral_paged.cache.pins import MAX_PINNED_BLOCKS
from spectral_paged.errors import CapacityError, InvalidRequestError
from support.cache_feed import LAYERS, ROPE, D, Feed, drive, expected, fmt, make
from support.reference import PlainCache
from support.tiny_model import random_prompts, tiny_format, tiny_llm

FORMATS = {
    "int8-512": fmt(),
    "int8-2048": fmt(segment=2048),
    "post": fmt("spectral-int8-post"),
    "no-landmarks": fmt(num_landmark_tokens=0),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LONG_PROMPT = 1700  # three blocks and a tail behind 64 landmarks

# spans of a prompt of 1700 tokens, and the blocks they touch; block b is [64 + 512 b, 576 + 512 b)
SPANS = {
    "landmarks only": ([(0, 64)], ()),
    "last landmark and first token of block 0": ([(63, 65)], (0,)),
    "first token of block 0": ([(64, 65)], (0,)),
    "last token of block 0": ([(575, 576)], (0,)),
    "first token of block 1": ([(576, 577)], (1,)),
    "across a border": ([(575, 577)], (0, 1)),
    "a whole block": ([(576, 1088)], (1,)),
    "unpinned between": ([(1100, 1101), (64, 70)], (0, 2)),
    "overlapping and repeated": ([(600, 700), (650, 800), (600, 700)], (1,)),
    "last partial block": ([(1699, 1700)], (3,)),
    "the whole prompt": ([(0, 1700)], (0, 1, 2, 3)),
}


@pytest.mark.parametrize("case", SPANS)
def test_a_span_pins_the_blocks_it_touches_and_landmarks_none(case):
    spans, blocks = SPANS[case]
    assert pinned_blocks(fmt(), spans, LONG_PROMPT) == blocks
    assert pinned_blocks(fmt("exact"), spans, LONG_PROMPT) == ()


@pytest.mark.parametrize("case", SPANS)
def test_pinned_blocks_stay_exact_and_the_others_seal(case):
    """Prompt chunks and single tokens attend over holes as the written rule says."""
    spans, blocks = SPANS[case]
    total = LONG_PROMPT + 3
    feed, cache = Feed(1, total), make()
    out = drive(cache, {"a": feed}, {"a": LONG_PROMPT}, {"a": total}, pins={"a": spans})["a"]
    assert cache.stats()["pages_in_use"] == LAYERS * len({0, 1, 2} - set(blocks))
    for layer in range(LAYERS):
        want = expected(feed, fmt(), LONG_PROMPT, total, layer, pins=spans)
        assert torch.allclose(out[layer], want, atol=2e-4, rtol=2e-4)
    unpinned = expected(feed, fmt(), LONG_PROMPT, total, 0)
    assert torch.allclose(out[0], unpinned, atol=1e-5) == (not {0, 1, 2} & set(blocks))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prompt", [640, 641, 1152, 1217, 2200])
def test_every_format_skips_holes_at_block_borders(name, prompt):
    format = FORMATS[name]
    total, spans = prompt + 3, [(500, 501), (min(1200, prompt - 1), prompt)]
    feed, cache = Feed(prompt, total), make(format)
    out = drive(cache, {"a": feed}, {"a": prompt}, {"a": total}, pins={"a": spans})["a"]
    want = expected(feed, format, prompt, total, 1, pins=spans)
    assert torch.allclose(out[1], want, atol=2e-4, rtol=2e-4)


def test_all_of_a_prompt_pinned_equals_exact():
    feed, cache = Feed(2, 1703), make()
    out = drive(cache, {"a": feed}, {"a": 1700}, {"a": 1703}, pins={"a": [(0, 1700)]})["a"]
    exact = expected(feed, fmt("exact"), 1700, 1703, 0)
    assert torch.allclose(out[0], exact, atol=2e-4, rtol=2e-4)
    assert cache.stats()["pages_sealed"] == cache.stats()["pages_attended"] == 0


def test_a_pinned_last_block_stays_exact_while_it_fills_with_generated_tokens():
    prompt, total, spans = 700, 1300, [(690, 700)]
    feed, cache = Feed(4, total), make()
    out = drive(cache, {"a": feed}, {"a": prompt}, {"a": total}, pins={"a": spans})["a"]
    assert cache.stats()["pages_in_use"] == LAYERS, "block 0 is a page, block 1 is past and exact"
    want = expected(feed, fmt(), prompt, total, 0, pins=spans)
    assert torch.allclose(out[0], want, atol=2e-4, rtol=2e-4)


def test_batch_mates_with_other_pins_change_nothing():
    pins = {"a": [(600, 610)], "b": (), "c": [(64, 65), (1500, 1501)]}
    prompts = {"a": 1300, "b": 1250, "c": 1700}
    totals = {s: n + 4 for s, n in prompts.items()}
    feeds = {s: Feed(i, totals[s]) for i, s in enumerate(prompts)}
    together = drive(make(), feeds, prompts, totals, pins=pins)
    for s in feeds:
        alone = drive(make(), {s: feeds[s]}, prompts, totals, pins=pins)[s]
        assert (alone - together[s]).norm() / alone.norm() < 1e-5


def test_exempt_layers_and_pins_go_together():
    spans = [(600, 601)]
    feed, cache = Feed(5, 1300), make(exempt_layers=[0])
    out = drive(cache, {"a": feed}, {"a": 1290}, {"a": 1300}, pins={"a": spans})["a"]
    exact = expected(feed, fmt("exact"), 1290, 1300, 0)
    assert torch.allclose(out[0], exact, atol=2e-4, rtol=2e-4)
    want = expected(feed, fmt(), 1290, 1300, 1, pins=spans)
    assert torch.allclose(out[1], want, atol=2e-4, rtol=2e-4)


def test_a_fork_shares_pinned_blocks_and_goes_its_own_way():
    prompt, fork_at, total, spans = 1300, 1305, 1900, [(600, 601)]
    feed, other, cache = Feed(3, total), Feed(9, total), make()
    for x in "qkv":
        getattr(other, x)[:, :fork_at] = getattr(feed, x)[:, :fork_at]
    prompts = {"a": prompt, "b": prompt}
    drive(cache, {"a": feed}, prompts, {"a": fork_at}, pins={"a": spans})
    used = cache.stats()["exact_pages_in_use"]
    assert cache.fork("a", "b")
    assert cache.stats()["exact_pages_in_use"] == used + LAYERS, "only the partial page is copied"
    outs = drive(cache, {"a": feed, "b": other}, prompts, {"a": total, "b": total})
    for s, f in (("a", feed), ("b", other)):
        want = expected(f, fmt(), prompt, total, 0, pins=spans)[fork_at:]
        assert torch.allclose(outs[s][0, fork_at:], want, atol=2e-4, rtol=2e-4)
    cache.free("a")
    cache.check_integrity()
    cache.free("b", forget=True)
    cache.check_integrity()
    assert cache.stats()["exact_pages_in_use"] == 0


def test_the_same_pins_hit_and_the_answer_stays():
    spans, length = [(600, 601)], 1700
    feed, cache, ids = Feed(1, length + 2), make(), list(range(length + 2))
    run = ({"a": length}, {"a": length + 2}, {"a": ids}, {"a": spans})
    drive(cache, {"a": feed}, *run)
    cache.free("a")
    out = drive(cache, {"a": feed}, *run)["a"]
    hit = int(cache.sequence_stats("a")["cached_tokens"])
    assert hit == length // 64 * 64
    want = expected(feed, fmt(), length, length + 2, 1, pins=spans)
    assert torch.allclose(out[1, hit:], want[hit:], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("other", [(), [(64, 65)], [(600, 601), (64, 65)]])
def test_different_pins_never_share(other):
    ids, cache = list(range(1700)), make()
    run = ({"a": 1700}, {"a": 1700}, {"a": ids}, {"a": [(600, 601)]})
    drive(cache, {"a": Feed(1, 1700)}, *run)
    assert cache.add_sequence("b", num_prompt_tokens=1700, token_ids=ids, pinned_spans=other) == 0
    same_blocks = [(1000, 1010), (5, 9)]
    hit = cache.add_sequence("c", num_prompt_tokens=1700, token_ids=ids, pinned_spans=same_blocks)
    assert hit > 0, "spans that pin the same blocks are the same pins"


def test_pinned_bytes_are_counted_in_the_ratio():
    spans, length = [(600, 601)], 1700
    feed, cache = Feed(1, length), make()
    drive(cache, {"a": feed}, {"a": length}, {"a": length}, pins={"a": spans})
    pages, exact = 2, 64 + 512 + (length - 64 - 3 * 512)
    bytes_held = LAYERS * (pages * fmt().page_bytes + -(-exact // 64) * fmt().exact_page_bytes(2))
    plain = length * LAYERS * 2 * D * 2 * 2
    stats = cache.sequence_stats("a")
    assert stats["compression_ratio"] == pytest.approx(plain / bytes_held)
    assert cache.stats()["compression_ratio"] == pytest.approx(plain / bytes_held)
    plain_cache = make()
    drive(plain_cache, {"a": feed}, {"a": length}, {"a": length})
    assert plain_cache.sequence_stats("a")["compression_ratio"] > stats["compression_ratio"]


# ---- refusals ----------------------------------------------------------------------------

BAD_SPANS = {
    "past the prompt": ([(0, 701)], r"\(0, 701\) does not lie in the prompt of 700 tokens"),
    "before it": ([(-1, 5)], r"\(-1, 5\) does not lie"),
    "empty": ([(5, 5)], r"\(5, 5\) does not lie"),
    "reversed": ([(9, 5)], r"\(9, 5\) does not lie"),
    "one good, one bad": ([(1, 5), (700, 701)], r"\(700, 701\)"),
    "a pair, not a list of pairs": ((3, 5), r"pinned_spans has 3: give a list of \(start, end\)"),
    "triples": ([(1, 2, 3)], r"\(1, 2, 3\): give a list"),
    "not integers": ([(1.0, 5)], r"\(1.0, 5\): give a list"),
    "booleans": ([(False, True)], "give a list"),
    "text": ("0-5", "'0-5': give a list"),
    "texts": (["05"], "'05': give a list"),
    "a mapping": ({"start": 1, "end": 5}, "give a list"),
    "a number": (7, "has 7: give a list"),
    "pairs of None": ([(None, None)], "give a list"),
}


@pytest.mark.parametrize("case", BAD_SPANS)
def test_bad_spans_are_refused_and_the_others_finish(case):
    spans, message = BAD_SPANS[case]
    prompt, other = random_prompts([700, 40])
    want = tiny_llm().generate([other], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    llm = tiny_llm()
    bad = {"prompt_token_ids": prompt, "pinned_spans": spans}
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate([bad, other], GREEDY, use_tqdm=False)
    refused, finished = caught.value.outputs
    assert refused is None and finished.outputs[0].token_ids == want
    assert llm.stats()["num_sequences"] == 0 and not llm.engine.has_unfinished()
    with pytest.raises(InvalidRequestError, match=message):
        llm.cache.add_sequence("a", num_prompt_tokens=700, pinned_spans=spans)
    llm.cache.check_integrity()


def test_more_blocks_than_a_sequence_may_pin_are_refused_unless_nothing_is_sealed():
    spans = [(64 + 512 * b, 65 + 512 * b) for b in range(MAX_PINNED_BLOCKS + 1)]
    assert len(pinned_blocks(fmt(), spans[:-1], 6000)) == MAX_PINNED_BLOCKS
    with pytest.raises(InvalidRequestError, match="9 blocks of 512 tokens; .* at most 8"):
        pinned_blocks(fmt(), spans, 6000)
    assert pinned_blocks(fmt("exact"), spans, 6000) == ()


def test_as_many_pinned_blocks_as_allowed_fit_the_tables():
    total = 64 + 512 * 10 - 1  # the last block never completes
    spans = [(64 + 512 * b, 65 + 512 * b) for b in range(1, MAX_PINNED_BLOCKS + 1)]
    feed = Feed(1, total)
    cache = make(max_model_len=5500)
    out = drive(cache, {"a": feed}, {"a": total - 2}, {"a": total}, pins={"a": spans})["a"]
    assert cache.stats()["pages_in_use"] == LAYERS
    first = expected(feed, fmt(), total - 2, 1700, 0, pins=spans)
    assert torch.allclose(out[0, :1700], first, atol=2e-4, rtol=2e-4)
    plain = PlainCache(fmt(), ROPE, total - 2, D**-0.5, pins=spans)
    plain.k, plain.v = feed.k[0, :-1], feed.v[0, :-1]
    last = plain.attend(feed.q[0, -1:], feed.k[0, -1:], feed.v[0, -1:])
    assert torch.allclose(out[0, -1:], last, atol=2e-4, rtol=2e-4)


def test_a_request_whose_pins_never_fit_is_refused_with_the_numbers():
    llm = tiny_llm(kv_cache_bytes=1_300_000, max_model_len=2500)
    good, prompt = random_prompts([40, 2300])
    assert llm.cache.fits_alone(2312, num_prompt_tokens=2300)
    bad = {"prompt_token_ids": prompt, "pinned_spans": [(64, 2000)]}
    message = (
        "2300 prompt tokens and up to 12 generated ones with 4 blocks of 512 pinned exact never "
        r"fit: .* at most \d+ tokens without pins: raise kv_cache_bytes, pin less"
    )
    with pytest.raises(CapacityError, match=message) as caught:
        llm.generate([bad, good], GREEDY, use_tqdm=False)
    assert caught.value.outputs[1].finished


def test_a_pin_past_the_sealed_blocks_takes_no_page_from_the_bound():
    """The pages of a sequence are counted by which of its sealed blocks are pinned."""
    cache = make()
    group = cache.groups[0]
    blocks, asked = group.arena.slots, []
    real, blocks.slabs_needed = blocks.slabs_needed, lambda e, p: asked.append(p) or real(e, p)
    for pinned, pages in (((), 2), ((0,), 1), ((2,), 2), ((0, 1), 0), ((1, 2), 1)):
        slabs_for(group, 64 + 1024 + 64, pinned)
        assert asked.pop() == pages


# ---- engine ------------------------------------------------------------------------------


def pinned_prompts(lengths, spans, seed=0):
    return [
        {"prompt_token_ids": p, "pinned_spans": [s for s in spans if s[1] <= len(p)]}
        for p in random_prompts(lengths, seed)
    ]


def token_lists(llm, prompts, params=GREEDY):
    out = llm.generate(prompts, params, use_tqdm=False)
    llm.cache.check_integrity()
    assert llm.stats()["num_sequences"] == 0
    return [[c.token_ids for c in o.outputs] for o in out]


def test_exact_says_the_same_with_pins_and_without():
    plain = random_prompts([700, 1300])
    pinned = pinned_prompts([700, 1300], [(64, 65), (900, 1000)])
    llm = tiny_llm(tiny_format("exact"))
    assert token_lists(llm, pinned) == token_lists(tiny_llm(tiny_format("exact")), plain)
    hits = llm.stats()["prefix_hit_tokens"]
    token_lists(llm, plain)
    assert llm.stats()["prefix_hit_tokens"] > hits, "pins mean nothing where nothing is sealed"


def test_a_prompt_pinned_whole_says_what_exact_says():
    lengths = [640, 1217, 1500]
    want = token_lists(tiny_llm(tiny_format("exact")), random_prompts(lengths))
    prompts = [
        {"prompt_token_ids": p, "pinned_spans": [(0, len(p))]} for p in random_prompts(lengths)
    ]
    coarse = PageFormat("coarse", 2, 16, ((16, 2),), ((16, 2),), prefill_segment=512)
    llm = tiny_llm(coarse)
    assert token_lists(llm, prompts) == want
    assert llm.stats()["pages_sealed"] == 0
    assert token_lists(tiny_llm(coarse), random_prompts(lengths)) != want, "pages are lossy"


@pytest.mark.parametrize("budget", [64, 512, 8192])
def test_batch_mates_order_and_budget_change_no_token_of_pinned_requests(budget):
    prompts = pinned_prompts([640, 1217, 1500, 70], [(0, 10), (700, 701)])
    alone = [token_lists(tiny_llm(), [p])[0] for p in prompts]
    llm = tiny_llm(max_num_batched_tokens=budget)
    assert token_lists(llm, prompts[::-1])[::-1] == alone
    assert llm.stats()["pages_attended"] > 0


def test_prefix_caching_changes_no_token_of_pinned_requests():
    shared, *ends = random_prompts([1300, 5, 90, 700], seed=9)
    prompts = [{"prompt_token_ids": shared + e, "pinned_spans": [(600, 610)]} for e in [*ends, []]]
    cold = tiny_llm(enable_prefix_caching=False)
    want = token_lists(cold, prompts)
    warm = tiny_llm()
    token_lists(warm, prompts[-1:])
    assert token_lists(warm, prompts) == want
    assert warm.stats()["prefix_hit_tokens"] >= 4 * 1280


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_and_resume_keep_pins(prefix_caching):
    prompts = pinned_prompts([600, 650, 700, 620, 900, 610], [(64, 65), (700, 701)], seed=5)
    params = SamplingParams(temperature=0.0, max_tokens=90)
    roomy = tiny_llm(enable_prefix_caching=False)
    want = token_lists(roomy, prompts, params)
    tight = tiny_llm(kv_cache_bytes=1_000_000, enable_prefix_caching=prefix_caching)
    assert token_lists(tight, prompts, params) == want
    assert tight.stats()["preemptions"] > 0 == roomy.stats()["preemptions"]


def test_n_completions_share_pins_and_equal_single_ones():
    prompt = pinned_prompts([1217], [(600, 601)])
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=11)
    together = token_lists(tiny_llm(), prompt, params)
    assert together == token_lists(tiny_llm(max_num_seqs=1), prompt, params)


def test_spans_may_come_from_any_iterable_and_none_is_no_span():
    prompt = random_prompts([700])[0]
    llm = tiny_llm()
    llm.engine.add_request("a", prompt, GREEDY, pinned_spans=iter([[64, 65]]))
    while llm.engine.has_unfinished():
        llm.engine.step()
    assert llm.stats()["pages_sealed"] == 0
    token_lists(llm, [{"prompt_token_ids": prompt, "pinned_spans": None}])
    assert llm.stats()["pages_sealed"] > 0


def test_an_unknown_key_of_a_prompt_mapping_is_refused():
    """A misspelt `pinned_spans` would be lost in silence."""
    with pytest.raises(InvalidRequestError, match="has .'pinned_span'.; it takes"):
        tiny_llm().generate({"prompt_token_ids": [1, 2], "pinned_span": [(0, 1)]}, GREEDY)
