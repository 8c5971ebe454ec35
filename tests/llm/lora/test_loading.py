"""LoRA adapters are loaded and unloaded while requests have them."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import BeamSearchParams, LLMEngine, LoRARequest, SamplingParams
from spectral_paged.engine import BeamSearch
from spectral_paged.errors import (
    AdapterError,
    InvalidRequestError,
)
from spectral_paged.models.lora import LoRALinear
from spectral_paged.models.parked_weights import ParkedWeights
from support.lora_adapters import (
    PARAMS,
    PROMPTS,
    lora_llm,
    tokens,
    unused,
)
from support.tiny_model import raise_once


def test_a_removed_adapter_serves_those_who_have_it(requests, want):
    llm = lora_llm(max_loras=1)
    engine = LLMEngine(llm)
    engine.add_request("a", PROMPTS[0], PARAMS, lora_request=requests["all"])
    engine.step()
    assert engine.list_loras() == {requests["all"].lora_int_id}
    assert engine.remove_lora(requests["all"].lora_int_id) and engine.list_loras() == set()
    with pytest.raises(AdapterError, match="'low' finds no place: max_loras is 1"):
        engine.add_lora(requests["low"])
    known = LoRARequest("all", requests["all"].lora_int_id)
    with pytest.raises(AdapterError, match="'all' is not loaded: loaded are none"):
        engine.add_request("c", PROMPTS[0], PARAMS, lora_request=known)
    engine.add_request("b", PROMPTS[0], PARAMS, lora_request=requests["low"])
    said = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            said[output.request_id] = output.outputs[0].token_ids
            assert len(said) == 1 or len(said["a"]) == 8, "the last one's place is taken"
    assert said == {"a": want["all"][0], "b": want["low"][0]}, "nothing of the last one is left"


def test_the_idle_adapter_that_was_used_longest_ago_gives_way(requests):
    llm = lora_llm(max_loras=2)
    llm.add_lora(requests["all"])
    for name in ("low", "root", "low"):
        llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=requests[name])
        assert {request.lora_name for request in llm.list_loras()} == {"all", name}
    llm.add_lora(requests["low"])
    with pytest.raises(AdapterError, match="'all', 'low' are loaded for good or in use: raise"):
        llm.generate(PROMPTS[0], PARAMS, use_tqdm=False, lora_request=requests["root"])


@pytest.mark.parametrize("max_loras", [1, 2])
@pytest.mark.parametrize("ahead", [False, True])
def test_requests_wait_for_places_and_others_pass_them(max_loras, ahead, requests, want):
    """Those of the base model, and of adapters that are there, do not wait."""
    llm = lora_llm(max_loras=max_loras)
    llm.engine.async_scheduling = ahead
    names = ["low", "all", "root", None, "low", "root", "all", None]
    asked = [requests[name] for name in names]
    engine, ended = LLMEngine(llm), []
    for place, request in enumerate(asked):
        engine.add_request(str(place), PROMPTS[place], PARAMS, lora_request=request)
    while engine.has_unfinished_requests():
        for output in engine.step():
            running = {a.index for a in llm.adapters._by_name.values() if a.index}
            assert len(running) <= max_loras
            if output.finished:
                ended.append(names[int(output.request_id)])
                place = int(output.request_id)
                assert output.outputs[0].token_ids == want[names[place]][place]
    assert ended.index("root") > max(ended.index(None), ended.index("low")) and len(ended) == 8
    assert ended[:3] != names[:3] and unused(llm) and not llm.adapters._waiting
    llm.cache.check_integrity()
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False, lora_request=asked)) == [
        want[name][place] for place, name in enumerate(names)
    ]


def test_a_request_that_waits_for_a_place_may_be_aborted_and_its_adapter_unloaded(requests, want):
    llm = lora_llm(max_loras=1)
    engine = LLMEngine(llm)
    engine.add_request("a", PROMPTS[0], PARAMS, lora_request=requests["all"])
    engine.add_request("b", PROMPTS[0], PARAMS, lora_request=requests["low"])
    engine.add_request("c", PROMPTS[0], PARAMS, lora_request=requests["root"])
    with pytest.raises(AdapterError, match="'all', 'low', 'root' are loaded for good or in use"):
        engine.add_lora(requests["all"])  # or the others would wait for ever
    with pytest.raises(AdapterError, match="'low' finds no place"):
        llm.beam_search(PROMPTS[:1], BeamSearchParams(2, 3), lora_request=requests["low"])
    engine.abort_request("b")
    assert engine.remove_lora(requests["root"].lora_int_id)
    again = LoRARequest("root", 9, requests["low"].lora_path)
    engine.add_request("d", PROMPTS[0], PARAMS, lora_request=again)
    said = {}
    while engine.has_unfinished_requests():
        said |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    assert said == {"a": want["all"][0], "c": want["root"][0], "d": want["low"][0]}
    assert [request.lora_name for request in llm.list_loras()] == ["root"] and unused(llm)


def test_a_beam_search_has_the_place_that_a_request_waits_for(requests, want):
    """Nothing runs meanwhile, and no step fails of it."""
    llm = lora_llm(max_loras=1)
    engine = llm.engine
    beams = BeamSearch(engine, PROMPTS[0], BeamSearchParams(2, 3), lora_request=requests["all"])
    engine.add_request("a", PROMPTS[0], PARAMS, lora_request=requests["low"])
    while not beams.finished:
        assert engine.step() == []
        beams.step()
    last = [engine.step() for _ in range(9)][7]
    assert tokens(last) == [want["low"][0]] and not engine.has_unfinished()


def test_an_adapter_that_is_named_asleep_is_loaded_awake(requests, want, monkeypatch):
    """As on a GPU, whose tensors have no memory meanwhile."""
    llm = lora_llm(max_loras=1)
    runner = llm.engine.runner
    monkeypatch.setattr(
        runner, "sleep", lambda: setattr(runner, "_parked", ParkedWeights(runner.model))
    )
    llm.sleep()
    llm.enqueue(PROMPTS[:1], PARAMS, lora_request=requests["low"])
    llm.wake_up()
    assert tokens(llm.wait_for_completion(use_tqdm=False)) == [want["low"][0]]


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
