"""Requests with LoRA adapters get what the merged model gives, whatever runs beside them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from spectral_paged import LLM, BeamSearchParams, LLMEngine, LoRARequest, SamplingParams
from spectral_paged.engine.adapters import prefix_salt
from spectral_paged.errors import (
    AdapterError,
    InvalidRequestError,
    SpectralPagedError,
    UnsupportedModelError,
)
from spectral_paged.models.calibration import model_fingerprint
from spectral_paged.models.decode_graphs import DecodeGraphs
from spectral_paged.models.lora import LoRALinear
from support.lora_adapters import KINDS, greedy, merged_model, save_adapter, save_kinds
from support.tiny_model import raise_once, random_prompts, tiny_format, tiny_llm, tiny_model

NAMES = [None, *KINDS]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8)
PROMPTS = random_prompts([5, 70, 600, 9, 33, 1200, 1, 64], seed=5)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_kinds(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def requests(paths):
    named = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(paths.items(), start=1)
    }
    return {None: None} | named


@pytest.fixture(scope="module")
def want(paths):
    """What each merged model says to each prompt, by transformers."""
    models = {name: merged_model(paths.get(name)) for name in NAMES}
    return {name: greedy(model, PROMPTS, 8) for name, model in models.items()}


def lora_llm(format="exact", **options):
    return tiny_llm(format, **{"enable_lora": True, "max_loras": 3} | options)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def unused(llm):
    """True if no request holds an adapter."""
    return not any(adapter.num_requests for adapter in llm.adapters._by_name.values())


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


# ---- the model ---------------------------------------------------------------------------


def test_calibrations_and_digests_are_of_the_model_without_adapters(requests):
    plain = tiny_model()
    llm = LLM.from_model(tiny_model(), kv_format="exact", kv_cache_bytes=16 << 20, enable_lora=True)
    model = llm.engine.runner.model
    llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=requests["low"])
    assert model_fingerprint(model) == model_fingerprint(plain)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters()] != names
    with llm.adapters.taken_out():
        assert [name for name, _ in model.named_parameters()] == names
    assert any(isinstance(part, LoRALinear) for part in model.modules())


def test_a_closed_llm_gives_the_model_back(requests):
    model = tiny_model()
    before = dict(model.named_modules())
    options = {"kv_format": "exact", "kv_cache_bytes": 16 << 20, "enable_lora": True}
    with LLM.from_model(model, **options) as llm:
        llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=requests["low"])
        assert dict(model.named_modules()).keys() != before.keys()
        with pytest.raises(UnsupportedModelError, match="another LLM: close that first"):
            LLM.from_model(model, **options)
    assert all(part is before[name] for name, part in model.named_modules())
    assert len(dict(model.named_modules())) == len(before)


def test_an_llm_that_cannot_be_made_gives_the_model_back(monkeypatch):
    model = tiny_model()
    before = dict(model.named_modules())
    monkeypatch.setattr("spectral_paged.llm.Engine", None)
    with pytest.raises(TypeError):
        LLM.from_model(model, kv_format="exact", kv_cache_bytes=16 << 20, enable_lora=True)
    assert all(part is before[name] for name, part in model.named_modules())


@pytest.mark.parametrize("injected", [False, True])
def test_adapters_of_a_peft_model_are_served_by_name(injected, want, paths):
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(tiny_model(), paths["low"], adapter_name="low")
    model.load_adapter(paths["root"], adapter_name="root")
    before = dict(model.named_modules())
    given_model = model
    if injected:
        given_model = model.get_base_model()
        given_model.peft_config = model.peft_config
    options = {"kv_format": "exact", "kv_cache_bytes": 16 << 20}
    with pytest.raises(UnsupportedModelError, match="merge_and_unload.*enable_lora=True"):
        LLM.from_model(given_model, **options)
    with pytest.raises(AdapterError, match="give max_loras=2"):
        LLM.from_model(given_model, enable_lora=True, **options)
    with LLM.from_model(given_model, enable_lora=True, max_loras=2, **options) as llm:
        assert [r.lora_name for r in llm.list_loras()] == ["low", "root"]
        asked = [*llm.list_loras(), None]
        got = llm.generate(PROMPTS[:3], PARAMS, use_tqdm=False, lora_request=asked)
    assert tokens(got) == [want["low"][0], want["root"][1], want[None][2]]
    assert all(part is before[name] for name, part in model.named_modules())
    model.set_adapter("root")
    assert greedy(model, PROMPTS[:1], 8) == [want["root"][0]]


def test_what_peft_does_besides_adapters_is_not_left_out(paths):
    """Prompts that are trained lie in no layer; a merged model has a config and no adapter."""
    peft = pytest.importorskip("peft")
    options = {"kv_format": "exact", "kv_cache_bytes": 16 << 20}
    asked = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trained = peft.get_peft_model(tiny_model(), asked)
    with pytest.raises(UnsupportedModelError, match="enable_lora=True"):
        LLM.from_model(trained, **options)
    with pytest.raises(AdapterError, match="of type 'PROMPT_TUNING'"):
        LLM.from_model(trained, enable_lora=True, **options)
    merged = peft.PeftModel.from_pretrained(tiny_model(), paths["low"]).merge_and_unload()
    assert LLM.from_model(merged, enable_lora=True, **options).list_loras() == []
    adapted = peft.PeftModel.from_pretrained(tiny_model(), paths["low"])
    adapted.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="call unmerge_adapter"):
        LLM.from_model(adapted, enable_lora=True, **options)


def test_fp8_weights_may_be_beneath(requests, tmp_path):
    """Rows without an adapter keep their bits."""
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    from support.served import letter_tokenizer

    letter_tokenizer().save_pretrained(tmp_path)
    options = {"device": "cpu", "quantization": "fp8-emulated", "kv_format": "exact"}
    options |= {"kv_cache_bytes": 16 << 20}
    plain = LLM(str(tmp_path), **options)
    llm = LLM(str(tmp_path), enable_lora=True, **options)
    want = tokens(plain.generate(PROMPTS, PARAMS, use_tqdm=False))
    asked = [None if i % 2 else requests["low"] for i in range(len(PROMPTS))]
    got = tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False, lora_request=asked))
    assert got[1::2] == want[1::2] and got[::2] != want[::2]


class Replay:
    """A graph that runs its step anew, as the host of a GPU would have it run."""

    def __init__(self, graphs, key):
        self.replay = lambda: graphs._step(*key)


def test_steps_without_adapters_have_graphs_of_their_own(monkeypatch, requests, want):
    llm = lora_llm()
    captured = []

    def capture(graphs, *key):
        captured.append(key)
        graphs._step(*key)  # it makes the logits
        return Replay(graphs, key)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    runner = llm.engine.runner
    runner.graphs = DecodeGraphs(llm.cache, runner._decode_logits, llm.adapters.tokens)
    with torch.inference_mode():
        plain = llm.generate(PROMPTS[:3], PARAMS, use_tqdm=False)
        assert tokens(plain) == want[None][:3]
        assert {adapted for *_, adapted in captured} == {False}
        asked = [requests["all"], None, requests["low"]]
        mixed = llm.generate(PROMPTS[:3], PARAMS, use_tqdm=False, lora_request=asked)
        assert tokens(mixed) == [want["all"][0], want[None][1], want["low"][2]]
        count = len(captured)
        assert {adapted for *_, adapted in captured} == {False, True}
        llm.remove_lora(requests["low"].lora_int_id)
        asked[2] = LoRARequest("again", 9, requests["low"].lora_path)
        mixed = llm.generate(PROMPTS[:3], PARAMS, use_tqdm=False, lora_request=asked)
        assert tokens(mixed) == [want["all"][0], want[None][1], want["low"][2]]
        assert len(captured) == count, "a load needs no capture"


# ---- loading and unloading ---------------------------------------------------------------


def test_a_removed_adapter_serves_those_who_have_it(requests, want):
    llm = lora_llm(max_loras=1)
    engine = LLMEngine(llm)
    engine.add_request("a", PROMPTS[0], PARAMS, lora_request=requests["all"])
    engine.step()
    assert engine.list_loras() == {requests["all"].lora_int_id}
    assert engine.remove_lora(requests["all"].lora_int_id) and engine.list_loras() == set()
    with pytest.raises(AdapterError, match="'low' finds no place: max_loras is 1"):
        engine.add_request("b", PROMPTS[0], PARAMS, lora_request=requests["low"])
    known = LoRARequest("all", requests["all"].lora_int_id)
    with pytest.raises(AdapterError, match="'all' is not loaded: loaded are none"):
        engine.add_request("c", PROMPTS[0], PARAMS, lora_request=known)
    while engine.has_unfinished_requests():
        (last,) = engine.step()
    assert last.outputs[0].token_ids == want["all"][0]
    engine.add_request("d", PROMPTS[0], PARAMS, lora_request=requests["low"])
    while engine.has_unfinished_requests():
        (last,) = engine.step()
    assert last.outputs[0].token_ids == want["low"][0], "nothing of the last one is left"


def test_the_idle_adapter_that_was_used_longest_ago_gives_way(requests):
    llm = lora_llm(max_loras=2)
    llm.add_lora(requests["all"])
    for name in ("low", "root", "low"):
        llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=requests[name])
        assert {request.lora_name for request in llm.list_loras()} == {"all", name}
    llm.add_lora(requests["low"])
    with pytest.raises(AdapterError, match="'all', 'low' are loaded for good or in use: raise"):
        llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=requests["root"])


def test_more_adapters_than_places_fail_alone(requests, want):
    llm = lora_llm(max_loras=2)
    asked = [requests[name] for name in ("low", "all", "root", None)]
    with pytest.raises(AdapterError, match="max_loras is 2") as caught:
        llm.generate(PROMPTS[:4], PARAMS, use_tqdm=False, lora_request=asked)
    first, second, bad, last = caught.value.outputs
    assert tokens([first, second, last]) == [want["low"][0], want["all"][1], want[None][3]]
    assert bad is None and caught.value.request_id == "prompt 2" and unused(llm)


def test_a_refused_request_holds_nothing(requests):
    llm = lora_llm()
    wrong = SamplingParams(max_tokens=3, bad_words=["x"])
    with pytest.raises(InvalidRequestError, match="bad_words need a tokenizer"):
        llm.generate(PROMPTS[0], wrong, use_tqdm=False, lora_request=requests["low"])
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        llm.generate([[10**6]], PARAMS, use_tqdm=False, lora_request=requests["all"])
    assert [request.lora_name for request in llm.list_loras()] == ["low"] and unused(llm)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_failed_steps_and_aborts_hold_no_adapter(step, requests, monkeypatch, want):
    llm = lora_llm()
    raise_once(monkeypatch, llm.engine.runner, "forward", RuntimeError("device"), step)
    with pytest.raises(RuntimeError, match="device"):
        llm.generate(PROMPTS[:2], PARAMS, use_tqdm=False, lora_request=requests["all"])
    assert unused(llm) and not llm.adapters.tokens.active
    stream = llm.stream(PROMPTS[:1], PARAMS, lora_request=requests["low"])
    next(stream)
    stream.close()
    assert unused(llm)
    got = llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=requests["all"])
    assert tokens(got) == [want["all"][0]]


def test_an_error_inside_of_the_model_leaves_no_adapter_active(requests, monkeypatch, want):
    llm = lora_llm()
    raise_once(monkeypatch, llm.cache, "attend", RuntimeError("kernel"), 3)
    with pytest.raises(RuntimeError, match="kernel"):
        llm.generate(PROMPTS[:2], PARAMS, use_tqdm=False, lora_request=requests["all"])
    assert tokens(llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False)) == [want[None][0]]
    assert unused(llm)


def test_a_load_that_fails_half_way_leaves_room_and_no_traces(requests, monkeypatch, want):
    llm = lora_llm(max_loras=1)
    raise_once(monkeypatch, LoRALinear, "write", torch.OutOfMemoryError("none"), 5)
    with pytest.raises(torch.OutOfMemoryError):
        llm.add_lora(requests["all"])
    assert llm.list_loras() == []
    got = llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=requests["low"])
    assert tokens(got) == [want["low"][0]]


# ---- what is asked for -------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, says",
    [
        (lambda r: "low", "lora_request is 'low'; give LoRARequest"),
        (lambda r: [r["low"]], "1 lora_requests for 2 prompts"),
        (lambda r: [r["low"], "low"], "lora_request is 'low'; give LoRARequest"),
        (lambda r: {"low": 1}, "give LoRARequest"),
        (lambda r: 5, "lora_request is 5"),
    ],
)
def test_what_is_no_adapter_is_refused(given, says, requests):
    with pytest.raises(AdapterError, match=says):
        lora_llm().generate(PROMPTS[:2], PARAMS, use_tqdm=False, lora_request=given(requests))


@pytest.mark.parametrize(
    "values, says",
    [
        (("", 1, "x"), "lora_name is ''"),
        ((None, 1, "x"), "lora_name is None"),
        (("a", 0, "x"), "lora_int_id is 0; it must be an integer above 0"),
        (("a", True, "x"), "lora_int_id is True"),
        (("a", "1", "x"), "lora_int_id is '1'"),
        (("a", 1, 5), "lora_path is 5"),
    ],
)
def test_a_request_says_what_it_takes(values, says):
    with pytest.raises(AdapterError, match=says):
        LoRARequest(*values)


def test_a_name_and_an_id_are_one_adapters(requests, tmp_path):
    llm = lora_llm()
    low, other = requests["low"], save_adapter(tmp_path / "other", seed=9)
    llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=low)
    for wrong, says in [
        (LoRARequest("low", 9, low.lora_path), "'low' is loaded with id 1 from"),
        (LoRARequest("low", 1, other), "give the same, or unload it first"),
        (LoRARequest("new", 1, other), "'low' with id 1 is loaded: give another name and id"),
    ]:
        with pytest.raises(AdapterError, match=says):
            llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=wrong)
    llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=LoRARequest("low", 1))


def test_an_llm_without_adapters_says_how_to_have_them(requests):
    llm = tiny_llm("exact")
    for call in (
        lambda: llm.generate(PROMPTS[0], use_tqdm=False, lora_request=requests["low"]),
        lambda: llm.enqueue(PROMPTS[0], lora_request=requests["low"]),
        lambda: list(llm.stream(PROMPTS[0], lora_request=requests["low"])),
        lambda: llm.beam_search(
            PROMPTS[:1], BeamSearchParams(beam_width=2, max_tokens=3), lora_request=requests["low"]
        ),
        lambda: LLMEngine(llm).add_request("a", PROMPTS[0], lora_request=requests["low"]),
        lambda: llm.add_lora(requests["low"]),
    ):
        with pytest.raises(AdapterError, match="make the LLM with enable_lora=True"):
            call()
    assert llm.list_loras() == []
    with pytest.raises(AdapterError, match="'low' is no adapter: give LoRARequest"):
        lora_llm().add_lora("low")
    with pytest.raises(AdapterError, match="'low' is not loaded: loaded are none"):
        lora_llm().add_lora(LoRARequest("low", 1))
    llm.close()
    with pytest.raises(SpectralPagedError, match="was closed"):
        llm.list_loras()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"max_loras": 0}, "max_loras is 0"),
        ({"max_lora_rank": 0}, "max_lora_rank is 0"),
        ({"lora_modules": ["a"]}, "write NAME=PATH"),
        ({"lora_modules": ["a=x", "a=y"]}, "'a' twice"),
        ({"lora_modules": ['{"name": "a"}']}, "write NAME=PATH"),
        ({"lora_modules": ['{"name": "a", "paht": "b"}']}, "it takes name, path"),
        ({"lora_modules": ["{"]}, "no JSON"),
        ({"lora_modules": "a=b"}, "it must be a list of texts"),
        ({"lora_modules": ["a=none/here"]}, "there is no folder 'none/here'"),
        ({"lora_modules": ["a=LOW", "b=LOW"]}, "give max_loras=2"),
        ({"lora_modules": ["a=LOW"], "enable_lora": False}, "needs enable_lora"),
        ({"lora_modules": ["a=ROOT"], "max_lora_rank": 8}, "has rank 16.*give max_lora_rank=16"),
    ],
)
def test_options_are_judged_before_a_model_is_looked_for(options, says, paths):
    if isinstance(options.get("lora_modules"), list):
        known = {"LOW": paths["low"], "ROOT": paths["root"]}
        texts = options["lora_modules"]
        for word, path in known.items():
            texts = [text.replace(word, path) for text in texts]
        options = options | {"lora_modules": texts}
    with pytest.raises(InvalidRequestError, match=says):
        LLM("no such model", **{"enable_lora": True} | options)


def test_modules_of_the_start_are_there_and_stay(paths, want):
    texts = [f"low={paths['low']}", json.dumps({"name": "all", "path": paths["all"]})]
    llm = lora_llm(lora_modules=texts, max_loras=2)
    assert [(r.lora_name, r.lora_int_id) for r in llm.list_loras()] == [("low", 1), ("all", 2)]
    asked = [LoRARequest("all", 2), LoRARequest("low", 1)]
    got = llm.generate(PROMPTS[:2], PARAMS, use_tqdm=False, lora_request=asked)
    assert tokens(got) == [want["all"][0], want["low"][1]]
    with pytest.raises(AdapterError, match="max_loras is 2"):
        llm.add_lora(LoRARequest("root", 3, paths["root"]))
