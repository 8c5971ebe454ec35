"""Named cases of serving, each beside a control run in `exact`, in poisoned memory.

The control of `exact` is the tiny model's own greedy continuation. The control of pages is the same
request alone, in a roomy pool without a prefix cache.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.errors import CapacityError
from support.tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model

FORMATS = ("spectral-int8", "exact")
BOTH = pytest.mark.parametrize("format", FORMATS)


def greedy(count):
    return SamplingParams(temperature=0.0, max_tokens=count)


def generate(llm, prompts, count):
    """Tokens of each prompt; the pool is whole afterwards."""
    outputs = llm.generate(prompts, greedy(count), use_tqdm=False)
    settled(llm)
    return [o.outputs[0].token_ids for o in outputs]


def settled(llm):
    llm.cache.check_integrity()
    assert llm.stats()["num_sequences"] == 0 and not llm.engine.has_unfinished()


def make(format, **options):
    return tiny_llm(tiny_format(format), **options)


@functools.cache
def own_model():
    return tiny_model()


def own_generate(prompt, count):
    """What the model itself says, through transformers."""
    ids = torch.tensor([prompt])
    out = own_model().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def control(format, prompts, count):
    if format == "exact":
        return [own_generate(p, count) for p in prompts]
    llm = make(format, enable_prefix_caching=False)
    return [generate(llm, [p], count)[0] for p in prompts]


def run_until(engine, done, limit=4000):
    """Step until `done()`; finished outputs by request."""
    finished = {}
    for _ in range(limit):
        if done():
            return finished
        finished |= {o.request_id: o for o in engine.step() if o.finished}
    raise AssertionError(f"not done after {limit} steps")


# ---- every length ------------------------------------------------------------------------

FIRST = 577  # 512 lengths from here: every residue of 512 and of 64, with one or two blocks


@functools.cache
def swept(format, prefix_caching):
    """Tokens of the prompts `text[:n]`, n = FIRST ... FIRST + 511, three each."""
    text = random_prompts([FIRST + 511], seed=21)[0]
    llm = make(format, enable_prefix_caching=prefix_caching, max_num_batched_tokens=2048)
    prompts = [text[:n] for n in range(FIRST, FIRST + 512)]
    found = generate(llm, prompts, 3)
    if llm.cache.format.seals:
        assert llm.stats()["pages_sealed"] > 900 and llm.stats()["pages_attended"] > 0
    return text, found


def test_every_length_mod_512_and_mod_64_says_what_the_model_says():
    """One forward pass over the longest prompt answers for every shorter one."""
    text, found = swept("exact", False)
    with torch.no_grad():
        first = own_model()(torch.tensor([text])).logits[0, FIRST - 1 :].argmax(-1).tolist()
    assert [tokens[0] for tokens in found] == first
    for n in (FIRST, FIRST + 62, FIRST + 63, FIRST + 64, FIRST + 511):
        assert found[n - FIRST] == own_generate(text[:n], 3)


def test_every_length_mod_512_and_mod_64_says_the_same_cold_and_warm():
    _, cold = swept("spectral-int8", False)
    _, warm = swept("spectral-int8", True)
    assert cold == warm
    _, exact = swept("exact", False)
    # prompts this short see no page: only what is generated does, after the first token
    assert [tokens[0] for tokens in cold] == [tokens[0] for tokens in exact]
    assert cold[:60] == exact[:60] and cold[64:] != exact[64:], "pages are lossy"


# ---- borders -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, landmarks",
    [("spectral-int8", 0), ("spectral-int8", 64), ("exact", 64)],  # `exact` has no use for them
)
@pytest.mark.parametrize("end", [512, 576, 640, 1024, 1088, 1152])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_sequence_may_end_on_a_block_or_page_border(format, landmarks, end, off):
    """The last token that is stored is the one before the last generated: 3 before the end, the
    prompt; so prompt, sequence and what is stored end there in turn."""
    prompt = random_prompts([end + off - 3], seed=end)[0]
    f = replace(tiny_format(format), num_landmark_tokens=landmarks)
    cold = tiny_llm(f, enable_prefix_caching=False)
    [want] = generate(cold, [prompt], 4)
    if format == "exact":
        assert want == own_generate(prompt, 4)
    warm = tiny_llm(f)
    for _ in range(2):  # cold, then warm
        assert generate(warm, [prompt], 4) == [want]
    whole = warm.stats()["prefix_hit_tokens"]
    assert whole == (len(prompt) - 1) // 64 * 64
    # the sequence itself, as somebody's prompt
    [more] = generate(cold, [prompt + want], 3)
    assert generate(warm, [prompt + want], 3) == [more]


@BOTH
@pytest.mark.parametrize("landmarks", [640, 1280])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 600, 639])
def test_landmarks_may_be_longer_than_the_prompt(format, landmarks, length):
    """Nothing is sealed until a block past the landmarks is complete, so all is as in `exact`."""
    f = replace(tiny_format(format), num_landmark_tokens=landmarks)
    prompts = random_prompts([length, length], seed=length)
    llm = tiny_llm(f)
    assert generate(llm, prompts, 5) == [own_generate(p, 5) for p in prompts]
    assert llm.stats()["pages_sealed"] == 0
    assert generate(llm, prompts, 5) == [own_generate(p, 5) for p in prompts]


# ---- the prefix cache --------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("length", [64, 65, 640, 705, 1217, 1700])
def test_the_same_prompt_cold_and_warm(format, length):
    prompt = random_prompts([length], seed=length)[0]
    want = control(format, [prompt], 8)
    llm = make(format)
    assert generate(llm, [prompt], 8) == want
    [warm] = llm.generate([prompt], greedy(8), use_tqdm=False)
    assert warm.outputs[0].token_ids == want[0]
    assert warm.metrics.num_cached_tokens == (length - 1) // 64 * 64


@BOTH
def test_a_prefix_hit_after_eviction_and_refill(format):
    prompt, *others = random_prompts([900, 880, 860, 870, 890, 850, 840, 830], seed=31)
    want = control(format, [prompt], 6)
    llm = make(format, kv_cache_bytes=1_200_000 if format == "exact" else 700_000)
    assert generate(llm, [prompt], 6) == want
    for other in others:
        generate(llm, [other], 6)
    assert llm.stats()["slots_evicted"] > 0
    outputs = [llm.generate([prompt], greedy(6), use_tqdm=False)[0] for _ in range(2)]
    assert [o.outputs[0].token_ids for o in outputs] == want * 2
    evicted, refilled = (o.metrics.num_cached_tokens for o in outputs)
    assert evicted < refilled == 896
    settled(llm)


@BOTH
@pytest.mark.parametrize("aborted", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_two_requests_share_a_prefix_and_one_is_aborted(format, aborted, steps):
    shared, *ends = random_prompts([1300, 20, 90], seed=9)
    prompts = [shared + e for e in ends]
    want = control(format, prompts, 12)
    llm = make(format)
    generate(llm, [shared], 1)
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, greedy(12))
    for _ in range(steps):
        llm.engine.step()
    llm.engine.abort(str(aborted))
    llm.cache.check_integrity()
    # somebody takes what became free
    llm.engine.add_request("other", random_prompts([700], seed=1)[0], greedy(2))
    left = 1 - aborted
    done = run_until(llm.engine, lambda: not llm.engine.has_unfinished())
    settled(llm)
    if str(left) in done:
        assert done[str(left)].outputs[0].token_ids == want[left]
    assert generate(llm, [prompts[left], prompts[aborted]], 12) == [want[left], want[aborted]]


# ---- pressure ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("prompt_length", [400, 574, 575, 576, 577, 620])
def test_a_request_may_fill_the_pool_to_its_last_slot(format, prompt_length):
    """The longest sequence that is not refused runs to its end, alone and unpreempted."""
    budget = 510_000 if format == "exact" else 430_000
    llm = make(format, kv_cache_bytes=budget, max_num_seqs=2)
    blocks, longest = llm.cache.groups[0].arena.slots, llm.cache.max_sequence_tokens
    assert longest > 630
    prompt = random_prompts([prompt_length], seed=3)[0]
    most = []

    def watch():
        used = sum(s.num_in_use > 0 for s in blocks._slabs.values())
        most.append(used / blocks.num_slabs)
        return not llm.engine.has_unfinished()

    count = longest - prompt_length
    llm.engine.add_request("a", prompt, greedy(count))
    done = run_until(llm.engine, watch)["a"]
    settled(llm)
    assert max(most) == 1.0, "every slab was in use"
    assert llm.stats()["preemptions"] == 0
    assert [done.outputs[0].token_ids] == control(format, [prompt], count)
    with pytest.raises(CapacityError, match=f"at most {longest} tokens"):
        llm.engine.add_request("b", prompt, greedy(count + 1))


@BOTH
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_all_requests_are_preempted_at_once(format, prefix_caching, monkeypatch):
    prompts = random_prompts([700, 30, 1217, 640], seed=12)
    want = control(format, prompts, 10)
    llm = make(format, enable_prefix_caching=prefix_caching)
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, greedy(10))
    for _ in range(4):
        llm.engine.step()
    progress = llm.cache.progress
    with monkeypatch.context() as patch:  # every next token needs a slot, and finds none
        patch.setattr(llm.cache, "progress", lambda s: (progress(s)[0], [False] * len(s)))
        patch.setattr(llm.cache, "try_reserve", lambda *_: False)
        assert llm.engine.step() == []
    assert not llm.engine.scheduler.running and len(llm.engine.scheduler.waiting) == 4
    llm.cache.check_integrity()
    done = run_until(llm.engine, lambda: not llm.engine.has_unfinished())
    assert [done[str(i)].outputs[0].token_ids for i in range(4)] == want
    assert all(o.metrics.num_preemptions == 1 for o in done.values())
    settled(llm)
