"""The prefix cache: hits, the order of eviction, sharing between sequences, and counters."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.batch.file import OutputFile
from spectral_paged.batch.run import BatchRun
from spectral_paged.cache.prefix_hit import prefix_chain
from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.errors import InvalidRequestError
from spectral_paged.pages import PRESETS
from spectral_paged.pool.slot_pool import SlotKind, SlotPool
from support.cache_feed import LAYERS, Feed, drive, fmt, make
from support.page_parts import toy_basis
from support.tiny_model import random_prompts, tiny_llm

FORMATS = {"int8": fmt(), "post": fmt("spectral-int8-post"), "exact": fmt("exact")}
EACH = pytest.mark.parametrize("name", FORMATS)
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


def free_slots(cache):
    """Slots of no sequence, to ask what the cache knows."""
    group = cache.groups[0]
    return SequenceSlots(0, group.retention, group.arena, group.exact_table, group.page_table)


def stored_bytes(cache, ids):
    """The bytes of every slot that the prompt `ids` can find, by kind and place."""
    group, found = cache.groups[0], {}
    chain, free = prefix_chain(cache.format, ids, len(ids), "", ()), free_slots(cache)
    for kind, find in ((SlotKind.EXACT, free.cached_exact), (SlotKind.PAGE, free.cached_page)):
        slots = [find(chain, i) for i in range(len(chain))]
        found |= {
            (kind, i): group.arena.span(slot, kind).clone().numpy().tobytes()
            for i, slot in enumerate(slots)
            if slot is not None
        }
    return found


def run(cache, name, ids, *, seed=1, total=None, prompt=None):
    """Store a sequence whose K and V depend on `seed` alone."""
    total = len(ids) if total is None else total
    prompt = len(ids) if prompt is None else prompt
    drive(cache, {name: Feed(seed, 2600)}, {name: prompt}, {name: total}, {name: ids})


def hit(cache, ids, **options):
    """Tokens that a new prompt would find; it is not run."""
    found = cache.add_sequence("probe", num_prompt_tokens=len(ids), token_ids=ids, **options)
    cache.free("probe")
    return found


# ---- granularity -------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("shared", [0, 63, 64, 65, 575, 576, 640, 1151, 1152, 1300, 2000])
def test_a_hit_is_all_full_exact_pages_that_are_shared(name, shared):
    cache = make(FORMATS[name])
    ids = list(range(2000))
    run(cache, "a", ids)
    other = ids[:shared] + [t + 5000 for t in range(2400 - shared)]
    assert hit(cache, other) == shared // 64 * 64
    cache.free("a")
    assert hit(cache, other) == shared // 64 * 64, "freed or held, all the same"


@EACH
@pytest.mark.parametrize("span", [64, 128, 576, 640, 1216])
def test_a_span_is_found_behind_the_tokens_it_was_computed_behind_and_no_others(name, span):
    """[X Y] and [Z] are stored. [Z Y] finds Z alone: Y's keys and values were computed behind X."""
    x, z = (list(range(start, start + span)) for start in (0, 10_000))
    y = list(range(20_000, 20_700))
    cache = make(FORMATS[name])
    run(cache, "a", x + y)
    run(cache, "b", z)
    assert hit(cache, z + y) == span
    assert hit(cache, x + y) == (span + len(y) - 1) // 64 * 64
    assert hit(cache, y) == 0


@EACH
@pytest.mark.parametrize("length", [64, 65, 128, 576, 640])
def test_a_prompt_that_is_known_whole_leaves_a_token_to_compute(name, length):
    cache, ids = make(FORMATS[name]), list(range(length))
    run(cache, "a", ids)
    assert hit(cache, ids) == (length - 1) // 64 * 64


@EACH
def test_an_answer_is_part_of_the_next_prompt_where_both_see_the_same(name):
    """In `exact` alone: elsewhere generated tokens saw other pages than prompt tokens would."""
    ids = list(range(700))
    cache = make(FORMATS[name])
    run(cache, "a", ids, prompt=300)
    assert hit(cache, [*ids, 7]) == (640 if name == "exact" else 256)


def test_a_hit_ends_where_its_own_view_begins_or_later():
    """A block that is left as a page alone is of no use before queries see it as a page."""
    cache, ids = make(), list(range(1300))
    run(cache, "a", ids)
    cache.free("a")
    chain, slots = prefix_chain(cache.format, ids, len(ids), "", ()), cache.groups[0].arena.slots
    for index in range(1, 10):  # the eight exact pages of block 0, and the one behind them
        slots.forget((SlotKind.EXACT, chain[index]))
    assert free_slots(cache).cached_page(chain, 0) is not None
    assert hit(cache, ids) == 64
    cache.check_integrity()


# ---- bytes -------------------------------------------------------------------------------


@EACH
def test_pages_are_the_same_bytes_when_they_are_used_again(name):
    ids = list(range(1900))
    cache = make(FORMATS[name], kv_cache_bytes=3_000_000)
    run(cache, "a", ids)
    first = stored_bytes(cache, ids)
    assert len(first) == 29 + (3 if FORMATS[name].seals else 0)
    cache.free("a")
    run(cache, "other", [t + 9000 for t in range(700)], seed=2)  # work beside it
    run(cache, "b", [*ids, 7], prompt=1900, total=1901)
    assert cache.sequence_stats("b")["cached_tokens"] == 1856
    assert cache.stats()["slots_evicted"] == 0
    assert stored_bytes(cache, ids) == first, "use changes no byte"
    fresh = make(FORMATS[name])
    run(fresh, "c", ids)
    pages = {key: page for key, page in first.items() if key[0] == SlotKind.PAGE}
    assert pages.items() <= stored_bytes(fresh, ids).items(), "encoding is pure"


# ---- who shares --------------------------------------------------------------------------


def all_formats():
    formats = [fmt(name) for name in PRESETS] + [fmt(segment=1024), fmt(hot_tokens=0)]
    formats += [
        replace(fmt("spectral-quality"), basis_id=toy_basis(LAYERS, 2, 16, seed=s).id)
        for s in (1, 2)
    ]
    return formats + [replace(fmt(), num_landmark_tokens=128)]


def test_no_format_finds_what_another_stored():
    """Every link of a chain carries the fingerprint, the calibration included."""
    formats = all_formats()
    assert len({f.fingerprint for f in formats}) == len(formats)
    chains = [prefix_chain(f, range(700), 700, "", ()) for f in formats]
    keys = [chain[i] for chain in chains for i in range(len(chain))]
    assert len(keys) == 10 * len(formats) == len(set(keys))


salts = st.text(max_size=12) | st.sampled_from(
    ["", "x/pinned (0,)", "x", "x', (0,)", "', (0,))", "\ud800", "None"]
)


roots = st.tuples(salts, st.lists(st.integers(0, 3), unique=True).map(sorted).map(tuple))


@settings(max_examples=200, deadline=None)
@given(a=roots, b=roots)
def test_chains_are_equal_for_equal_salt_and_pins_only(a, b):
    first, second = (prefix_chain(fmt(), range(70), 70, *x) for x in (a, b))
    assert (first[0] == second[0]) == (a == b)


def test_a_salt_cannot_spell_the_pins_of_another():
    cache = make()
    ids = list(range(700))
    cache.add_sequence(
        "a", num_prompt_tokens=700, token_ids=ids, cache_salt="x", pinned_spans=[(0, 65)]
    )
    run(cache, "a", ids)
    assert hit(cache, ids, cache_salt="x", pinned_spans=[(0, 65)]) == 640
    assert hit(cache, ids, cache_salt="x/pinned (0,)") == hit(cache, ids, cache_salt="x") == 0


@pytest.mark.parametrize("salt", ["tenant", "\ud800", "x" * 10_000])
def test_requests_of_different_salts_share_nothing(salt):
    llm, [prompt] = tiny_llm(), random_prompts([900])
    mine = {"prompt_token_ids": prompt, "cache_salt": salt}
    asked = [prompt, mine, mine, {"prompt_token_ids": prompt, "cache_salt": None}]
    outputs = [llm.generate(p, GREEDY, use_tqdm=False)[0] for p in asked]
    assert [o.metrics.num_cached_tokens for o in outputs] == [0, 0, 896, 896]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    with pytest.raises(InvalidRequestError, match="cache_salt is 5; it must be a string"):
        llm.generate([{"prompt_token_ids": prompt, "cache_salt": 5}], GREEDY, use_tqdm=False)


def test_lines_of_a_batch_have_salts_and_say_what_was_cached(tmp_path):
    [prompt] = random_prompts([700])
    body = {"prompt": prompt, "max_tokens": 2}
    lines = [
        {"prompt": prompt, "max_tokens": 2},
        {"prompt": prompt, "max_tokens": 2, "cache_salt": "mine"},
        {"custom_id": "c", "url": "/v1/completions", "body": body | {"cache_salt": "mine"}},
        {"custom_id": "d", "url": "/v1/completions", "body": body | {"cache_salt": 7}},
    ]
    source, output = tmp_path / "in.jsonl", OutputFile(tmp_path / "out.jsonl")
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    BatchRun(tiny_llm(max_num_seqs=1), source, output).run({"temperature": 0.0}, quiet=True)
    output.close()
    got = {r["line"]: r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert [got[n]["metrics"]["cached_tokens"] for n in (1, 2)] == [0, 0]
    usage = got[3]["response"]["body"]["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 640}
    assert "cache_salt is 7; it must be a string" in got[4]["error"]["message"]


# ---- what is counted ---------------------------------------------------------------------


def test_queries_and_hits_are_counted_in_tokens_per_request_and_in_total():
    llm = tiny_llm()
    prompts = random_prompts([700, 130, 10], seed=3)
    for _ in range(2):
        for p in prompts:
            llm.generate([p], GREEDY, use_tqdm=False)
    outputs = llm.generate([prompts[0] + [5], prompts[1]], GREEDY, use_tqdm=False)
    assert [o.metrics.num_cached_tokens for o in outputs] == [640, 128]
    stats = llm.stats()
    assert stats["prefix_query_tokens"] == 2 * 840 + 701 + 130
    assert stats["prefix_hit_tokens"] == 640 + 128 + 0 + 640 + 128
    assert stats["resumed_query_tokens"] == stats["resumed_hit_tokens"] == 0


def test_a_fork_is_no_hit():
    llm = tiny_llm()
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4)
    [out] = llm.generate(random_prompts([700]), params, use_tqdm=False)
    stats = llm.stats()
    assert (stats["prefix_query_tokens"], stats["prefix_hit_tokens"]) == (700, 0)
    assert out.metrics.num_cached_tokens == 0


def test_siblings_without_a_seat_ask_for_no_prompt():
    llm = tiny_llm(max_num_seqs=1)
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4)
    llm.generate(random_prompts([700]), params, use_tqdm=False)
    stats = llm.stats()
    assert (stats["prefix_query_tokens"], stats["prefix_hit_tokens"]) == (700, 0)
    assert (stats["resumed_query_tokens"], stats["resumed_hit_tokens"]) == (2 * 701, 2 * 640)


def test_tokens_after_the_prompt_are_neither_asked_for_nor_hit():
    cache, ids = make(FORMATS["exact"]), list(range(300))
    for name in "ab":
        run(cache, name, ids, prompt=200)
    assert cache.sequence_stats("b")["cached_tokens"] == 256
    stats = cache.stats()
    assert (stats["prefix_query_tokens"], stats["prefix_hit_tokens"]) == (400, 200)


def test_a_resume_that_finds_itself_is_counted_apart(monkeypatch):
    llm, [prompt] = tiny_llm(), random_prompts([700])
    llm.engine.add_request("first", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=9))
    llm.engine.add_request("a", prompt, GREEDY)
    llm.engine.step()
    reserve, progress, done = llm.cache.try_reserve, llm.cache.progress, {}
    with monkeypatch.context() as patch:  # the next token of "a" needs a slot, and finds none
        patch.setattr(llm.cache, "progress", lambda s: (progress(s)[0], [False] * len(s)))
        patch.setattr(llm.cache, "try_reserve", lambda s, n: s != "a#0" and reserve(s, n))
        llm.engine.step()
    while llm.engine.has_unfinished():
        done |= {o.request_id: o for o in llm.engine.step()}
    stats, metrics = llm.stats(), done["a"].metrics
    assert (stats["prefix_query_tokens"], stats["prefix_hit_tokens"]) == (703, 0)
    assert (stats["resumed_query_tokens"], stats["resumed_hit_tokens"]) == (701, 640)
    assert metrics.num_cached_tokens == 0
    assert metrics.num_recomputed_tokens == stats["recomputed_tokens"] == 60, "700 were dropped"


# ---- what is evicted first ---------------------------------------------------------------


def chain_length(cache, chain):
    """Full exact pages from the beginning that are cached, and every one that is."""
    known = [free_slots(cache).cached_exact(chain, i) is not None for i in range(len(chain))]
    return (known.index(False) if False in known else len(known)), sum(known)


@pytest.mark.parametrize("together", [False, True])
def test_a_chain_is_evicted_from_its_end(together):
    """Two sequences share a beginning; they come one after the other, or at once, when each
    stores the beginning and only the first is found by it."""
    cache = make(FORMATS["exact"], kv_cache_bytes=3_600_000)
    group, shared = cache.groups[0], list(range(640))
    ids = {s: shared + [t + 1000 * i for t in range(600)] for i, s in enumerate("ab", 1)}
    feeds, counts = {s: Feed(1, 1240) for s in ids}, dict.fromkeys(ids, 1240)
    for names in (["a", "b"],) if together else (["a"], ["b"]):
        drive(cache, {s: feeds[s] for s in names}, counts, counts, ids)
    cache.free("a")
    cache.free("b")
    cache.check_integrity()
    chains = [prefix_chain(cache.format, ids[s] + [0], 1241, "", ()) for s in ids]
    held, lengths = [], []
    for _ in range(group.arena.slots.num_slabs):
        held.append(group.arena.slots.allocate(SlotKind.EXACT))
        for chain in chains:
            front, known = chain_length(cache, chain)
            assert front == known, "what is cached is reached from the beginning"
        lengths.append([chain_length(cache, c)[0] for c in chains])
    assert lengths[0] == [19, 19] and lengths[-1] == [0, 0] and None not in held


def test_landmarks_outlive_the_pages_that_need_them():
    """New prompts want exact pages only: pages of the oldest chain make room before the
    landmarks that begin it, for without those its pages are found by nobody."""
    cache = make(kv_cache_bytes=1_500_000, max_num_seqs=32)
    ids = list(range(1500))
    run(cache, "old", ids)
    cache.free("old")
    free, blocks = free_slots(cache), cache.groups[0].arena.slots
    chain = prefix_chain(cache.format, ids, 1500, "", ())
    assert free.cached_page(chain, 0) is not None and free.cached_exact(chain, 0) is not None
    seen = set()
    while (slot := blocks.allocate(SlotKind.EXACT)) is not None:
        assert slot >= 0
        pages = sum(free.cached_page(chain, b) is not None for b in (0, 1))
        landmarks = free.cached_exact(chain, 0) is not None
        assert landmarks or not pages, "pages without their landmarks"
        seen.add((landmarks, pages))
    assert (False, 0) in seen and (True, 2) in seen


def test_of_what_pages_replaced_the_beginning_is_kept_longest():
    """Prompts that share a part of a long sequence find the exact pages of its first blocks."""
    cache = make(kv_cache_bytes=2_000_000)
    ids = list(range(2100))
    run(cache, "a", ids)
    cache.free("a")
    blocks = cache.groups[0].arena.slots
    chain = prefix_chain(cache.format, ids, 2100, "", ())
    seen = set()
    while blocks.allocate(SlotKind.EXACT) is not None:
        front, known = chain_length(cache, chain)
        assert front == known
        seen.add(front)
    assert {0, 1, 9, 17} <= seen


def test_a_slot_that_stands_in_for_another_is_found_when_that_is_gone():
    pool = SlotPool(3, {SlotKind.EXACT: 1})
    first, second = pool.allocate(SlotKind.EXACT), pool.allocate(SlotKind.EXACT)
    assert pool.publish(first, "k") and not pool.publish(second, "k")
    pool.release(first)
    pool.allocate(SlotKind.EXACT)
    pool.allocate(SlotKind.EXACT)  # evicts the first
    assert pool.lookup("k") is None
    assert not pool.release(second) and pool.lookup("k") == second
    pool.check_integrity()


def test_an_old_slab_of_pages_goes_before_young_exact_pages_and_the_other_way_round():
    for old, young in ((SlotKind.PAGE, SlotKind.EXACT), (SlotKind.EXACT, SlotKind.PAGE)):
        pool = SlotPool(2, {SlotKind.EXACT: 2, SlotKind.PAGE: 1})
        slots = [pool.allocate(old), pool.allocate(young)]
        for slot, key in zip(slots, ("old", "young")):
            pool.publish(slot, key)
            pool.release(slot)
        while pool.lookup("old") is not None:
            assert pool.allocate(young) is not None
            assert pool.lookup("young") is not None
        pool.check_integrity()
