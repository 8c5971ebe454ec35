"""Sliding windows: the slots of a sequence, prefix hits on them, and the inputs of graphs."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from spectral_paged import SpectralKVCache
from spectral_paged.cache.prefix_hit import prefix_chain
from spectral_paged.cache.token_places import TokenPlaces
from spectral_paged.cli.info import model_report, report_format
from spectral_paged.errors import FormatError
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.pages import PageFormat
from spectral_paged.pool.slot_pool import SlotKind
from spectral_paged.rope import RotaryTable
from support.cache_feed import slots_of
from support.families import build, generate, llm_of, reference
from support.tiny_model import random_prompts

H, D, LONGEST = 1, 16, 3000
ROPE = RotaryTable.from_theta(10000.0, D, max_positions=LONGEST)


def preset(name, segment=512):
    return PageFormat.preset(name, num_kv_heads=H, head_dim=D, prefill_segment=segment)


def cache_of(name="spectral-int8", windows=(None, 1100, 200), **options):
    defaults = {"kv_cache_bytes": 3 << 20, "max_num_seqs": 4, "debug_poison": True}
    return SpectralKVCache(
        num_layers=len(windows),
        num_q_heads=2,
        num_kv_heads=H,
        head_dim=D,
        rope=ROPE,
        sliding_windows=windows,
        format=preset(name),
        **(defaults | options),
    )


def step(cache, new):
    plan = cache.reserve(new)
    if plan is None:
        return False
    cache.begin_step(plan)
    for layer in range(cache.num_layers):
        cache.attend(layer, *(torch.randn(plan.num_tokens, h, D) for h in (2, H, H)))
    cache.end_step()
    return True


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_slots_say_where_every_token_is(data):
    """Against a list of what each span of 64 tokens is in."""
    landmarks, num_tokens = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 5000))
    spans = -(-num_tokens // 64)
    full = max(0, num_tokens // 64 - landmarks) // 8
    pinned = tuple(sorted(data.draw(st.sets(st.integers(0, 9), max_size=3))))
    slots = TokenPlaces(landmarks, pinned, num_sealed=data.draw(st.integers(0, full)))
    first = data.draw(st.integers(0, spans - 1))
    slots.first_page = first if first <= landmarks else first - (first - landmarks) % 8
    block_of = [-1 if i < landmarks else (i - landmarks) // 8 for i in range(spans)]
    held = range(slots.first_page, spans)
    sealed = [i for i in held if 0 <= block_of[i] < slots.num_sealed and block_of[i] not in pinned]
    exact = [i for i in held if i not in sealed]
    assert slots.num_exact(num_tokens) == len(exact)
    assert slots.num_sealed_pages * 8 == len(sealed)
    for place, index in enumerate(exact):
        assert slots.exact_place(index) == place and not slots.is_sealed(index)
    for place, index in enumerate(sealed[::8]):
        assert slots.num_pages(slots.block_of(index)) == place and slots.is_sealed(index)
    position = data.draw(st.integers(0, num_tokens - 1))
    before = sum(min(64, max(0, position - 64 * i)) for i in exact)
    assert slots.exact_before(position) == before
    told = []
    for run_ in slots.runs(num_tokens):
        entries = range(run_.start, run_.stop)
        if run_.sealed:
            told += range(*map(slots.first_index, (run_.start, run_.stop)))
            assert run_.num_tokens == 512 * len(entries)
        else:
            told += [exact[entry] for entry in entries]
            assert len(entries) == -(-run_.num_tokens // 64)
    assert told == list(held), "by position, and everything once"


@pytest.mark.parametrize("name", ["exact", "spectral-int8"])
def test_what_left_the_window_is_given_back(name):
    cache = cache_of(name)
    cache.add_sequence("a", num_prompt_tokens=2500)
    at = 0
    while at < 2900:
        count = max(1, min(cache.chunk_limit("a"), 2500 - at))
        assert count <= 512
        assert step(cache, {"a": count})
        at += count
        for place, group in enumerate(cache.groups):
            slots = slots_of(cache, "a", place)
            need = group.retention.while_generating(at)
            if at >= 2500:
                assert len(slots.exact) <= need.num_exact
                assert len(slots.pages) <= need.num_pages + 1, "one may be sealed ahead"
            if group.window is not None:
                tokens = len(slots.exact) * 64 + len(slots.pages) * 512
                assert tokens < group.window + 128 + 2 * 512 * group.seals
        cache.check_integrity()
    windows = {group.window: group.seals for group in cache.groups}
    assert windows == {None: name != "exact", 1100: name != "exact", 200: False}
    stats = cache.sequence_stats("a")
    assert stats["compression_ratio"] > (0.85 if name == "exact" else 1.3)
    cache.free("a")
    assert cache.stats()["exact_pages_in_use"] == cache.stats()["pages_in_use"] == 0


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 16), st.sampled_from(["exact", "spectral-int8"]), st.data())
def test_a_sequence_that_fits_alone_always_gets_its_slots(size, name, data):
    """Up to the longest that fits, in chunks of any size."""
    windows = data.draw(st.sampled_from([(None, 200), (1100,), (1, 1025), (None, 1500, 65)]))
    memory = len(windows) * (60_000 + 20_000 * size)
    cache = cache_of(name, windows, kv_cache_bytes=memory)
    longest = min(cache.max_sequence_tokens, LONGEST)
    assert longest > 0
    prompt = data.draw(st.integers(1, longest))
    cache.add_sequence("a", num_prompt_tokens=prompt)
    at = 0
    while at < longest:
        most = cache.chunk_limit("a") if at < prompt else min(40, cache.chunk_limit("a"))
        count = min(longest - at, data.draw(st.integers(max(1, most - 5), most)))
        plan = cache.reserve({"a": count})
        assert plan is not None, f"{at} of {longest} tokens, {count} more"
        cache.begin_step(plan)
        for layer in range(len(windows)):
            cache.append(layer, *torch.ones(2, count, H, D))
        cache.end_step()
        at += count
    cache.check_integrity()


def test_memory_holds_one_longest_sequence_before_many_short_ones():
    """With windows what a token costs depends on the length; without, the division is as it was."""
    small = cache_of(kv_cache_bytes=400_000)
    assert small.max_sequence_tokens < LONGEST
    enough = cache_of(kv_cache_bytes=1 << 20)
    assert enough.max_sequence_tokens == LONGEST
    plenty = cache_of("exact", (None, 200), kv_cache_bytes=4 << 20, max_num_seqs=17)
    count = 0
    while plenty.add_sequence(f"s{count}", num_prompt_tokens=1500) is not None:
        if not all(step(plenty, {f"s{count}": 500}) for _ in range(3)):
            break
        count += 1
    assert plenty.stats()["kv_cache_usage"] > 0.75, "no group is full long before another"


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral, a window that is sealed"])
@pytest.mark.parametrize("format", ["exact", "spectral-int8"])
def test_prefix_hits_and_preemption_change_no_token(name, format):
    """Prompts with a common beginning, in turn and in a pool that is too small for all."""
    model, common = build(name), random_prompts([1300], seed=5)[0]
    prompts = [common + tail for tail in random_prompts([40, 90, 300], seed=6)]
    options = {"kv_format": format, "prefill_segment": 512}
    cold = llm_of(model, enable_prefix_caching=False, **options)
    want = generate(cold, prompts, 12)
    if format == "exact":
        assert want == reference(build(name), prompts, 12)
    assert cold.stats()["prefix_hit_tokens"] == 0
    llm = llm_of(model, **options)
    assert [generate(llm, [prompt], 12)[0] for prompt in prompts] == want
    assert llm.stats()["prefix_hit_tokens"] >= 2 * 1100
    tight = llm_of(model, kv_cache_bytes=1_200_000, max_model_len=1640, **options)
    assert generate(tight, prompts, 12) == want and tight.stats()["preemptions"] > 0


def test_a_hit_needs_the_window_and_no_more():
    """Pages of the window's group are evicted by others; the hit ends before those that lack."""
    cache = cache_of("exact", (None, 200))
    ids = torch.randint(50, (1400,)).tolist()
    assert cache.add_sequence("a", num_prompt_tokens=1400, token_ids=ids) == 0
    for _ in range(3):
        step(cache, {"a": min(512, 1400 - cache.num_tokens("a"))})
    cache.free("a")
    _, window = cache.groups
    chain_end = 1344 // 64
    assert cache.add_sequence("b", num_prompt_tokens=1400, token_ids=ids) == chain_end * 64
    assert len(slots_of(cache, "b", 1).exact) == 4, "200 tokens before 1,344 are in four pages"
    chain = cache._sequences.by_id["b"].chain
    cache.free("b")
    window.arena.slots.forget((0, chain[chain_end - 2]))
    found = cache.add_sequence("c", num_prompt_tokens=1400, token_ids=ids)
    assert found == (chain_end - 2) * 64
    cache.free("c")
    window.arena.slots.drop_cached()
    assert cache.add_sequence("d", num_prompt_tokens=1400, token_ids=ids) == 0


def test_a_hit_needs_the_windows_of_every_group():
    """One group's gap shortens the hit, and the shorter one meets another gap of another group."""
    cache = cache_of("exact", (200, 330))
    ids = torch.randint(50, (1400,)).tolist()
    assert cache.add_sequence("a", num_prompt_tokens=1400, token_ids=ids) == 0
    for _ in range(3):
        step(cache, {"a": min(512, 1400 - cache.num_tokens("a"))})
    cache.free("a")
    chain = prefix_chain(cache.format, ids, 1400, "", ())
    for group, index in ((0, 19), (1, 16), (0, 14)):
        assert cache.groups[group].window == (200, 330)[group]
        cache.groups[group].arena.slots.forget((SlotKind.EXACT, chain[index]))
    assert cache.add_sequence("b", num_prompt_tokens=1400, token_ids=ids) == 14 * 64
    cache.check_integrity()


def test_a_hit_needs_the_pages_inside_a_window():
    """Without block 2's page in the windows' group, it ends before queries see that as a page."""
    cache = cache_of(windows=(None, 1100))
    ids = torch.randint(50, (2400,)).tolist()
    cache.add_sequence("a", num_prompt_tokens=2400, token_ids=ids)
    while cache.num_tokens("a") < 2400:
        step(cache, {"a": min(2400 - cache.num_tokens("a"), cache.chunk_limit("a"))})
    cache.free("a")
    [window] = [group for group in cache.groups if group.window is not None]
    chain = prefix_chain(cache.format, ids, 2400, "", ())
    found = []
    for block in (None, 0, 2):
        if block is not None:
            window.arena.slots.forget((SlotKind.PAGE, chain[8 * (block + 1)]))
        found.append(cache.add_sequence("b", num_prompt_tokens=2400, token_ids=ids))
        cache.check_integrity()
        cache.free("b")
    assert found == [2368, 2368, 2048], "block 0 has left the window"


def test_info_counts_what_a_window_holds():
    config = tf.Gemma3TextConfig(num_hidden_layers=6, max_position_embeddings=32768)
    geometry = ModelGeometry.from_config(config)
    assert geometry.windows == (4096,) * 5 + (None,)
    short = ModelGeometry.from_config(tf.Gemma3TextConfig(num_hidden_layers=6, sliding_window=512))
    text = model_report("m", short, 1 << 30)
    assert "5 of 6 layers see 512 tokens" in text
    format = PageFormat.preset("exact", num_kv_heads=short.num_kv_heads, head_dim=short.head_dim)
    report, page = report_format(format, short, 1 << 30), format.exact_page_bytes(2)
    assert report.bytes_at[8192] == page * (8192 // 64 + 5 * (512 // 64 + 0))
    assert report.bytes_per_token == page / 64, "a further token costs in the full layer alone"


def test_online_calibration_of_groups_that_seal_apart_is_refused():
    shared = PageFormat("s", H, D, ((16, 4),), ((16, 4),), basis="shared")
    for options in ({"rope": [ROPE, None]}, {"rope": ROPE, "sliding_windows": [None, 1100]}):
        with pytest.raises(FormatError, match="2 groups .*calibrate the model"):
            SpectralKVCache(
                num_layers=2,
                num_q_heads=2,
                num_kv_heads=H,
                head_dim=D,
                format=shared,
                kv_cache_bytes=1 << 20,
                calibration="online",
                **options,
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": [ROPE]}, "rope has 1 entries; the model has 3"),
        ({"sliding_windows": [1, 2]}, "sliding_windows has 2 entries"),
        ({"sliding_windows": 0}, "window of 0 tokens"),
        ({"rope": None}, "pass the model's RotaryTable"),
        ({"rope": [None] * 3}, "max_model_len must be given"),
        ({"max_model_len": LONGEST + 1}, f"has {LONGEST} positions"),
    ],
)
def test_layers_that_make_no_sense_are_refused(options, message):
    given_ = {"rope": ROPE} | options
    with pytest.raises(FormatError, match=message):
        SpectralKVCache(
            num_layers=3,
            num_q_heads=2,
            num_kv_heads=H,
            head_dim=D,
            format=preset("spectral-int8"),
            kv_cache_bytes=1 << 20,
            **given_,
        )
