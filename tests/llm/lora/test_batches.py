"""Requests with LoRA adapters get what the merged model gives, whatever runs beside them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from spectral_paged import LLM, BeamSearchParams, LoRARequest, SamplingParams
from spectral_paged.engine.adapters import prefix_salt
from support.foretold_drafts import SPECULATION, foretell
from support.lora_adapters import (
    KINDS,
    NAMES,
    PARAMS,
    PROMPTS,
    lora_llm,
    merged_model,
    save_adapter,
    tokens,
    unused,
)
from support.tiny_model import VOCAB, random_prompts, tiny_format, tiny_llm, tiny_model


@pytest.mark.parametrize("grouped", [False, True], ids=["stacked", "grouped"])
def test_a_batch_of_adapters_gives_what_merged_models_give(grouped, requests, want):
    llm = lora_llm()
    llm.adapters.tokens.grouped = grouped
    assert len({json.dumps(want[name]) for name in NAMES}) == 4, "adapters change nothing"
    for shift in range(4):
        names = [NAMES[(place + shift) % 4] for place in range(len(PROMPTS))]
        asked = [requests[name] for name in names]
        got = llm.generate(PROMPTS, PARAMS, use_tqdm=False, lora_request=asked)
        assert tokens(got) == [want[name][place] for place, name in enumerate(names)]
    assert unused(llm)
    llm.cache.check_integrity()


@pytest.mark.parametrize("name", KINDS)
def test_peft_merges_the_same(name, paths):
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(tiny_model(), paths[name]).merge_and_unload()
    for ours, other in zip(merged_model(paths[name]).parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_draft_is_computed_with_the_adapter_of_its_sequence(ahead, requests, want):
    names = [NAMES[place % 4] for place in range(len(PROMPTS))]
    said = {
        len(prompt): [*prompt, *want[name][place]]
        for place, (prompt, name) in enumerate(zip(PROMPTS, names))
    }
    llm = lora_llm(speculative_config=SPECULATION)
    llm.engine.async_scheduling = ahead
    foretell(llm.engine, lambda c, _: said[len(c.owner.prompt_token_ids)], VOCAB)
    asked = [requests[name] for name in names]
    got = llm.generate(PROMPTS, PARAMS, use_tqdm=False, lora_request=asked)
    assert tokens(got) == [want[name][place] for place, name in enumerate(names)]
    stats = llm.stats()
    accepted = stats["spec_decode_num_accepted_tokens"]
    assert 0 < accepted < stats["spec_decode_num_draft_tokens"]
    llm.cache.check_integrity()


@pytest.mark.parametrize("ahead", [False, True])
def test_batch_equals_alone_over_pages(ahead, requests):
    """Spectral pages, seals and hits included; one adapter for all is that of each."""
    llm = lora_llm(tiny_format())
    llm.engine.async_scheduling = ahead
    alone = {}
    for name in NAMES:
        for place, prompt in enumerate(PROMPTS):
            output = llm.generate(prompt, PARAMS, use_tqdm=False, lora_request=requests[name])
            alone[name, place] = tokens(output)[0]
    assert llm.stats()["pages_sealed"] > 0
    llm.reset_prefix_cache()
    names = [NAMES[place % 4] for place in range(len(PROMPTS))]
    for _ in range(2):  # without hits, and with
        got = llm.generate(
            PROMPTS, PARAMS, use_tqdm=False, lora_request=[requests[name] for name in names]
        )
        assert tokens(got) == [alone[name, place] for place, name in enumerate(names)]
    assert llm.stats()["prefix_hit_tokens"] > 0


def test_siblings_beams_and_prompt_logprobs_have_the_adapter(requests, paths):
    prompt, plain = PROMPTS[1], tiny_llm("exact")
    llm, merged = (
        lora_llm(),
        LLM.from_model(merged_model(paths["all"]), kv_format="exact", kv_cache_bytes=16 << 20),
    )
    params = SamplingParams(
        temperature=1.0, n=3, seed=7, max_tokens=6, prompt_logprobs=0, logprobs=0
    )
    (got,) = llm.generate([prompt], params, use_tqdm=False, lora_request=requests["all"])
    (other,) = merged.generate([prompt], params, use_tqdm=False)
    assert [c.token_ids for c in got.outputs] == [c.token_ids for c in other.outputs]
    assert len({tuple(c.token_ids) for c in got.outputs}) > 1
    for ours, theirs in zip(got.prompt_logprobs[1:], other.prompt_logprobs[1:]):
        assert ours.keys() == theirs.keys()
        for token, logprob in ours.items():
            assert logprob.logprob == pytest.approx(theirs[token].logprob, abs=1e-3)
    beams = BeamSearchParams(beam_width=3, max_tokens=6)
    (found,) = llm.beam_search([prompt], beams, lora_request=requests["all"])
    (same,) = merged.beam_search([prompt], beams)
    (base,) = plain.beam_search([prompt], beams)
    assert [s.tokens for s in found.sequences] == [s.tokens for s in same.sequences]
    assert [s.tokens for s in found.sequences] != [s.tokens for s in base.sequences]
    assert unused(llm)


def test_preempted_requests_go_on_with_their_adapters(requests):
    prompts = random_prompts([150 + 10 * i for i in range(6)], seed=2)
    asked = [requests[NAMES[i % 4]] for i in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=120)
    want = tokens(lora_llm().generate(prompts, params, use_tqdm=False, lora_request=asked))
    llm = lora_llm(kv_cache_bytes=480 << 10, enable_prefix_caching=False)
    got = llm.generate(prompts, params, use_tqdm=False, lora_request=asked)
    assert llm.stats()["preemptions"] > 0
    assert tokens(got) == want and unused(llm)


# ---- prefixes ----------------------------------------------------------------------------


class Key:
    index = 1

    def __init__(self, key):
        self.key = key


SALTS = st.text(alphabet="lora:0af", max_size=12)
KEYS = st.none() | st.sampled_from([c * 64 for c in "0af"])


@given(st.lists(st.tuples(SALTS, KEYS), min_size=2, max_size=2, unique=True))
def test_no_salt_spells_an_adapter(pairs):
    one, other = (prefix_salt(salt, None if key is None else Key(key)) for salt, key in pairs)
    assert one != other


@pytest.fixture(scope="module")
def hit_llm():
    return lora_llm(tiny_format(), kv_cache_bytes=32 << 20)


def identity(llm, request):
    return None if request is None else llm.adapters._by_name[request.lora_name].key


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(["", "s", "spelled"]), st.booleans()),
        min_size=2,
        max_size=6,
    )
)
def test_a_hit_is_of_the_same_adapter_and_salt(hit_llm, requests, steps):
    """`spelled` is a salt that a client makes of another adapter's key."""
    llm, seen = hit_llm, set()
    for request in requests.values():
        if request is not None:
            llm.add_lora(request)
    key = identity(llm, requests["low"])
    llm.reset_prefix_cache()
    for name, salt, other in steps:
        salt = f"lora:{key}" if salt == "spelled" else salt
        prompt = {"prompt_token_ids": random_prompts([130], seed=int(other))[0], "cache_salt": salt}
        output = llm.generate(
            prompt,
            SamplingParams(temperature=0.0, max_tokens=1),
            use_tqdm=False,
            lora_request=requests[name],
        )
        assert (output[0].metrics.num_cached_tokens > 0) == ((name, salt, other) in seen)
        seen.add((name, salt, other))


def test_an_adapter_of_the_same_name_with_other_weights_shares_nothing(tmp_path):
    llm, prompt = lora_llm(max_loras=1), random_prompts([200])[0]
    cached = []
    for folder, seed, number in (("a", 1, 1), ("b", 2, 1), ("a", 1, 1), ("a", 1, 2)):
        request = LoRARequest("x", number, save_adapter(tmp_path / folder, seed=seed))
        assert llm.add_lora(request) and not llm.add_lora(request)
        output = llm.generate(prompt, PARAMS, use_tqdm=False, lora_request=request)
        cached.append(output[0].metrics.num_cached_tokens > 0)
        assert llm.remove_lora(number) and not llm.remove_lora(number)
    assert cached == [False, False, True, False]


def test_a_store_keeps_prefixes_of_adapters_apart_and_those_of_the_model(tmp_path, requests):
    """A store that an LLM without adapters wrote serves the base model of one with them."""
    prompt = random_prompts([200])[0]
    store = {"kv_store": tmp_path / "kv", "kv_host_memory": 8 << 20}
    with tiny_llm("exact", **store) as plain:
        plain.generate(prompt, PARAMS, use_tqdm=False)
    for name, hits in ((None, True), ("low", False), ("low", True), ("all", False)):
        with lora_llm(**store) as llm:
            (output,) = llm.generate(prompt, PARAMS, use_tqdm=False, lora_request=requests[name])
            assert (output.metrics.num_disk_cached_tokens > 0) == hits, name
