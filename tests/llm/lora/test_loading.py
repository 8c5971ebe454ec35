"""LoRA adapters are loaded and unloaded while requests have them."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import LLMEngine, LoRARequest, SamplingParams
from spectral_paged.errors import (
    AdapterError,
    InvalidRequestError,
)
from spectral_paged.models.lora import LoRALinear
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
