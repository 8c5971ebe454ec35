"""Quantized checkpoints on a CUDA device, compiled and in graphs; `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectral_paged import LLM, PageFormat, SamplingParams
from spectral_paged.models import loader
from spectral_paged.models.calibration import calibrate
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.linear_weights import packed_layers
from support.quantized_checkpoints import FOUR_BITS_IN_INTEGERS, KINDS, is_installed, write
from support.tiny_model import random_prompts, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
FORMAT = {"num_kv_heads": 2, "head_dim": 64, "prefill_segment": 512}
LOGPROBS = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0)
MOST = 0.15  # nats between two orders of the same bf16 or fp16 sums


def by_letter(prompt):
    return {"input_ids": [ord(c) % 199 for c in prompt]}


def made(folder, kind, **options):
    eager = kind == "bitsandbytes 8-bit"  # whose products wait for the host
    defaults = {"kv_format": "exact", "kv_cache_bytes": 64 << 20, "enforce_eager": eager}
    return LLM(folder, device="cuda", dtype="bfloat16", **(defaults | options))


@pytest.fixture(params=[*KINDS, *FOUR_BITS_IN_INTEGERS])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path, monkeypatch):
    for package in (KINDS | FOUR_BITS_IN_INTEGERS)[kind][0].split():
        if not is_installed(package):
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    write(kind, tmp_path, torch.bfloat16, **WIDE)
    return tmp_path


def differences(model, outputs):
    """Of each token's log-probability, to that of the model over the same tokens."""
    found = []
    for output in outputs:
        said = output.outputs[0]
        ids = torch.tensor([[*output.prompt_token_ids, *said.token_ids]], device=GPU)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        start = len(output.prompt_token_ids) - 1
        for i, (token, given) in enumerate(zip(said.token_ids, said.logprobs, strict=True)):
            found.append(abs(given[token].logprob - float(logits[start + i, token])))
    return found


def test_exact_is_what_the_loaded_model_says(kind, folder):
    prompts = random_prompts([1, 64, 577, 1217])
    loaded = loader.load_model(str(folder), device=GPU, dtype=torch.bfloat16)
    kept = kind.startswith("compressed-tensors fp8") and torch.cuda.get_device_capability() >= (
        8,
        9,
    )
    packed = kept or not kind.startswith("compressed-tensors")
    assert bool(list(packed_layers(loaded.model))) is packed
    with made(folder, kind) as llm:
        outputs = llm.generate(prompts, LOGPROBS, use_tqdm=False)
        again = llm.generate(prompts, LOGPROBS, use_tqdm=False)
    assert max(differences(loaded.model, [*outputs, *again])) < MOST


def test_transformers_loads_the_same_weights(kind, folder):
    if kind.startswith("compressed-tensors fp8"):
        pytest.skip("transformers multiplies it in bf16 unless it is asked not to")
    ours = loader.load_model(str(folder), device=GPU, dtype=torch.bfloat16).model
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype, device_map={"": GPU})
    ids = torch.tensor(random_prompts([64]), device=GPU)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_calibrated_pages_are_near_exact_ones(kind, folder):
    loaded = loader.load_model(str(folder), device=GPU, dtype=torch.bfloat16)
    named = loader.LoadedModel("tiny", loaded.model, by_letter, loaded.geometry)
    basis = calibrate(named, ["x y z " * 200], max_spans=1)
    format = PageFormat.preset("spectral-quality", **FORMAT)
    with made(folder, kind, kv_format=format, calibration=basis) as llm:
        outputs = llm.generate(random_prompts([1217, 900]), LOGPROBS, use_tqdm=False)
        assert llm.stats()["pages_attended"] > 0
    assert sorted(differences(loaded.model, outputs))[8] < 1.0


def test_it_sleeps_and_wakes(kind, folder):
    prompts = random_prompts([70])
    with made(folder, kind) as llm:
        [before] = llm.generate(prompts, LOGPROBS, use_tqdm=False)
        llm.sleep()
        llm.wake_up()
        [after] = llm.generate(prompts, LOGPROBS, use_tqdm=False)
    assert before.outputs[0].token_ids == after.outputs[0].token_ids


def test_four_bits_at_loading(tmp_path, monkeypatch):
    if not is_installed("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    model = tiny_model(**WIDE).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert ModelGeometry.from_config(model.config).head_dim == 64
    with made(tmp_path, "", quantization="bitsandbytes") as llm:
        outputs = llm.generate(random_prompts([1, 64, 577]), LOGPROBS, use_tqdm=False)
        assert llm.stats()["weight_bytes"] < 0.5 * sum(p.nbytes for p in model.parameters())
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
