"""A folder with anything in it is an adapter that works or is refused, and others finish."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from spectral_paged import LoRARequest, SamplingParams
from spectral_paged.errors import AdapterError, NonFiniteError
from support.lora_adapters import PARAMS, PROMPTS, lora_llm, save_adapter, tokens, unused

SHORT = SamplingParams(temperature=0.0, max_tokens=3)
NUMBERS = st.sampled_from([0, -1, 1, 2.5, 10**400, 1e308, -1e-320, math.inf, math.nan, True])
TEXTS = st.sampled_from(["", "q_proj", "(?i)q_proj", "q_proj(", "a{99999999999}", "(" * 500, "é"])
PLAIN = st.none() | NUMBERS | TEXTS
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(TEXTS, PLAIN, max_size=2)
FIELDS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "peft_type",
        "bias",
        "use_dora",
        "lora_dropout",
        "eva_config",
    ]
)
DTYPES = [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.uint16]
CHANGES = {
    "nothing": lambda t: t,
    "no numbers": lambda t: t[:0],
    "one number": lambda t: t.sum(),
    "flat": torch.flatten,
    "turned": lambda t: t.t(),
    "fewer rows": lambda t: t[:-1],
    "large": lambda t: t * 1e30,
    "larger": lambda t: t.double() * 1e300,
    "NaN": lambda t: t * math.nan,
    "16 bits": torch.Tensor.half,
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
}


@pytest.fixture(scope="module")
def llm():
    return lora_llm(max_loras=2)


@pytest.fixture(scope="module")
def good(llm, requests):
    """What the adapter beside says alone."""
    llm.add_lora(requests["low"])
    return tokens(llm.generate(PROMPTS[:1], SHORT, use_tqdm=False, lora_request=requests["low"]))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@example({"r": True}, "nothing", 0)
@example({"lora_alpha": 10**400}, "nothing", 0)
@example({"alpha_pattern": {"(?i)q_proj": 1}}, "nothing", 0)
@example({"rank_pattern": ["q_proj"]}, "nothing", 0)
@example({"lora_alpha": 1e308}, "nothing", 0)
@example({}, "large", 1)
@given(
    st.dictionaries(FIELDS, VALUES, max_size=2), st.sampled_from(sorted(CHANGES)), st.integers(0, 7)
)
def test_it_works_or_is_refused(llm, good, requests, config, change, place):
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder, **config)
        path = Path(folder) / "adapter_model.safetensors"
        found = load_file(path)
        name = sorted(found)[place]
        save_file(found | {name: CHANGES[change](found[name]).contiguous()}, path)
        bad = LoRARequest("bad", 9, folder)
        try:
            llm.add_lora(bad)
        except AdapterError:
            assert [r.lora_name for r in llm.list_loras()] == ["low"]
            return
        asked = [requests["low"], LoRARequest("bad", 9)]
        try:
            outputs = llm.generate(PROMPTS[:2], SHORT, use_tqdm=False, lora_request=asked)
        except NonFiniteError as error:  # numbers so large fail their own request
            outputs = error.outputs
            assert outputs[1].error is error
        assert tokens(outputs[:1]) == good and unused(llm)
        assert llm.remove_lora(9)


def test_an_idle_adapter_stays_where_the_next_cannot_be_loaded(requests, want, tmp_path):
    llm = lora_llm(max_loras=1)
    low = requests["low"]
    llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=low)
    large = LoRARequest("large", 9, save_adapter(tmp_path, alpha=1e300))
    with pytest.raises(AdapterError, match="too large for the model's torch.float32"):
        llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=large)
    assert llm.list_loras() == [low]
    known = LoRARequest("low", low.lora_int_id)
    got = llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=known)
    assert tokens(got) == [want["low"][0]]
    said = json.loads((tmp_path / "adapter_config.json").read_text()) | {"lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=large)
    assert llm.list_loras() == [large]


def test_an_idle_adapter_stays_where_memory_for_the_next_runs_out(requests, want, monkeypatch):
    llm = lora_llm(max_loras=1)
    low, count = requests["low"], []

    def fails_late(tensor, *args):
        count.append(1)
        if len(count) == 5:
            raise MemoryError("none left")
        return to(tensor, *args)

    llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=low)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", fails_late)
    with pytest.raises(MemoryError, match="none left"):
        llm.add_lora(requests["all"])
    monkeypatch.undo()
    assert llm.list_loras() == [low]
    got = llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False, lora_request=low)
    assert tokens(got) == [want["low"][0]]
