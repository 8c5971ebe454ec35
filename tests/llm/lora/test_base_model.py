"""The model beneath LoRA adapters: what stays its own, and what it is given back as."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import LLM, LoRARequest
from spectral_paged.errors import (
    AdapterError,
    UnsupportedModelError,
)
from spectral_paged.models.calibration import model_fingerprint
from spectral_paged.models.decode_graphs import DecodeGraphs
from spectral_paged.models.lora import LoRALinear
from support.lora_adapters import (
    PARAMS,
    PROMPTS,
    greedy,
    lora_llm,
    tokens,
)
from support.tiny_model import tiny_model


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
