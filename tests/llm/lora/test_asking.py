"""What requests and options may say of LoRA adapters, and what is refused."""

from __future__ import annotations

import json

import pytest

from spectral_paged import LLM, BeamSearchParams, LLMEngine, LoRARequest
from spectral_paged.errors import (
    AdapterError,
    InvalidRequestError,
    SpectralPagedError,
)
from support.lora_adapters import (
    PARAMS,
    PROMPTS,
    lora_llm,
    save_adapter,
    tokens,
)
from support.tiny_model import tiny_llm


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
        (("a", 10**5000, "x"), "lora_int_id is an integer of 16610 bits"),
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
        ({"lora_modules": ['{"a":' * 100_000]}, "no JSON"),
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
