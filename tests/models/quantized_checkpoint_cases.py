"""Checkpoints quantized by the packages that transformers asks for: `make quantized`.

Each is a small random model, quantized and saved by its package, and loaded by its folder.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, QuantoConfig

from spectral_paged import LLM, LoRARequest, PageFormat, SamplingParams
from spectral_paged.errors import UnsupportedModelError
from spectral_paged.models import loader
from spectral_paged.models.calibration import calibrate, model_fingerprint
from spectral_paged.models.linear_weights import check_products, packed_layers, packed_matrix
from spectral_paged.models.parked_weights import ParkedWeights
from spectral_paged.models.quantized_weights import is_packed
from spectral_paged.models.runner import compiled_parts
from spectral_paged.models.stored_tensors import stored_bytes, stored_tensors
from spectral_paged.models.weights_digest import weights_digest
from support.lora_adapters import save_adapter
from support.quantized_checkpoints import COMPRESSED, KINDS, four_bits, is_installed, write
from support.tiny_model import random_prompts, tiny_model

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
NEAR = PageFormat("near", 2, 16, ((16, 8),), ((16, 8),), basis="shared", prefill_segment=512)
LENGTHS = [1, 64, 577, 1217]


def by_letter(prompt):
    """A tokenizer: one token a letter."""
    return {"input_ids": [ord(c) % 199 for c in prompt]}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    if not is_installed(KINDS[kind][0]):
        pytest.skip(f"{KINDS[kind][0]} is not installed")
    where = tmp_path_factory.mktemp("checkpoint")
    write(kind, where)
    return where


def generated(model, prompt):
    """The new tokens of a prompt by transformers alone."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def said(folder):
    """Prompts, each with what transformers generates."""
    model, prompts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for prompt in random_prompts(LENGTHS):
        prompts.append((prompt, generated(model, prompt)))
    return prompts


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))


def made(folder, **options):
    defaults = {"kv_format": "exact", "kv_cache_bytes": 16 << 20, "debug_poison": True}
    return LLM(folder, device="cpu", **(defaults | options))


def tokens(llm, prompts):
    found = llm.generate(prompts, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in found]


def load(folder, dtype=torch.float32):
    return loader.load_model(str(folder), device=CPU, dtype=dtype)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_exact_says_what_transformers_says(folder, said, prefix_caching):
    prompts, want = map(list, zip(*said))
    with made(folder, enable_prefix_caching=prefix_caching) as llm:
        assert tokens(llm, prompts) == want
        assert tokens(llm, prompts) == want, "with what is cached of the same prompts"
        assert [tokens(llm, [prompt]) for prompt in prompts] == [[ids] for ids in want]
        hits = llm.stats()["prefix_hit_tokens"]
    assert bool(hits) is prefix_caching


@pytest.mark.parametrize("weights", ["int4", "int2"])
def test_weights_that_do_not_multiply_in_inference_mode_are_refused(tmp_path, weights):
    """quanto's fail there, of less than 8 bits, and transformers' `generate` does not use it."""
    if not is_installed("optimum-quanto"):
        pytest.skip("optimum-quanto is not installed")
    model = tiny_model(intermediate_size=128)
    model.config.quantization_config = QuantoConfig(weights=weights)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="QLinear.*version_counter.*bf16"):
        made(tmp_path)


def test_what_was_preempted_goes_on(folder, said):
    prompts, want = map(list, zip(*said))
    alike, room = [prompts[1]] * 6, 7 * 64 * 2 * 2 * 2 * 16 * 4  # exact pages: 6 prompts and one
    with made(folder, kv_cache_bytes=room, enable_prefix_caching=False) as llm:
        assert tokens(llm, alike) == [want[1]] * 6
        assert llm.stats()["preemptions"] > 0


def test_calibrated_pages_say_what_exact_says(folder, said):
    """Pages of eight bits a component; the calibration is made of what multiplies."""
    prompts, want = map(list, zip(*said))
    model = load(folder)
    model = loader.LoadedModel("tiny", model.model, by_letter, model.geometry)
    basis = calibrate(model, ["x y z " * 200], max_spans=1)
    with made(folder, kv_format=NEAR, calibration=basis) as llm:
        together = tokens(llm, prompts)
        stats = llm.stats()
        llm.cache.reset_prefix_cache()
        assert [tokens(llm, [prompt]) for prompt in prompts] == [[ids] for ids in together]
    assert stats["pages_attended"] > 0
    assert together[:2] == want[:2], "too short for a page"
    same = sum(a == b for x, y in zip(together, want) for a, b in zip(x, y))
    assert same > 0.8 * 12 * len(want)


def test_stats_say_what_is_stored(kind, folder):
    model = load(folder).model
    check_products("", model)  # bitsandbytes packs for a CPU in another way
    with made(folder) as llm:
        stats = llm.stats()
    assert stats["weight_bytes"] == stored_bytes(model)
    layers = [name for name, _ in packed_layers(model)]
    assert len(layers) == (0 if kind in COMPRESSED else 14)
    if layers:
        method = kind.split()[0]
        assert stats["quantization"] == method and is_packed(model.config)
        whole = stored_bytes(tiny_model(intermediate_size=128))
        assert stats["weight_bytes"] < 0.5 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_is_what_multiplies(folder, dtype):
    model = load(folder, dtype).model
    for _, layer in packed_layers(model):
        torch.manual_seed(0)
        inputs = torch.randn(5, layer.in_features).to(dtype)
        with torch.no_grad():
            got, want = (
                layer(inputs).float(),
                inputs.float() @ packed_matrix(layer, dtype).float().T,
            )
        assert float((got - want).norm() / want.norm()) < 0.02


def test_fingerprint_and_digest_are_of_the_weights(kind, folder, tmp_path):
    one, two = (load(folder).model for _ in range(2))
    assert weights_digest(one, ()) == weights_digest(two, ())
    own = model_fingerprint(one)
    assert model_fingerprint(two) == own == model_fingerprint(one)
    assert weights_digest(one, ()) == weights_digest(two, ())
    seen = {weights_digest(two, ())}
    tensors = dict(stored_tensors(two))
    for name in [n for n in tensors if n.startswith("model.layers.1.self_attn.v_proj")]:
        flat = tensors[name].data.view(-1).view(torch.uint8)
        flat[0] ^= 1
        seen.add(weights_digest(two, ()))
    assert len(seen) > 1 + (kind not in COMPRESSED)
    write(kind, tmp_path, rms_norm_eps=1e-6, hidden_size=128)
    assert model_fingerprint(load(tmp_path).model) != own


def test_a_calibration_is_alike_in_every_dtype(folder):
    wide, narrow = (load(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    found = []
    for loaded in (wide, narrow):
        loaded = loader.LoadedModel("tiny", loaded.model, by_letter, loaded.geometry)
        found.append(calibrate(loaded, ["x y z " * 200], max_spans=1))
    one, other = (basis.k_post for basis in found)
    assert float((one - other).norm() / one.norm()) < 0.05


def test_compiled_layers_compute_the_same(kind, folder):
    if kind == "bitsandbytes 8-bit":
        pytest.skip("its products wait for the host, so it is run eagerly")
    model = load(folder).model
    ids = torch.tensor(random_prompts([9, 17])[1:])
    with torch.inference_mode():
        want = model(ids).logits
        compiled_parts(model)[0].compile(dynamic=True, backend="eager")
        for length in (17, 5):
            got = model(ids[:, :length]).logits
            assert torch.allclose(got, want[:, :length], rtol=1e-4, atol=1e-3)


def test_weights_are_parked_and_come_back(folder):
    model, ids = load(folder).model, torch.tensor(random_prompts([9]))
    with torch.inference_mode():
        want = model(ids).logits
    with torch.inference_mode():  # what safetensors maps from a file has no size of its own
        for _, tensor in stored_tensors(model):
            tensor.set_(tensor.clone())
    parked = ParkedWeights(model)
    assert parked.num_bytes >= stored_bytes(model)
    assert not any(t.untyped_storage().nbytes() for _, t in stored_tensors(model))
    parked.restore()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, want)


def test_adapters_are_added_to_packed_layers(folder, tmp_path):
    targets = ("q_proj", "v_proj", "down_proj")
    plain = tiny_model(intermediate_size=128)
    path = save_adapter(tmp_path / "adapter", model=plain, targets=targets)
    stored, model = load_file(f"{path}/adapter_model.safetensors"), load(folder).model
    for name, layer in model.named_modules():
        a = stored.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:
            b = stored[f"base_model.model.{name}.lora_B.weight"]
            layer.register_forward_hook(
                lambda _, inputs, output, a=a, b=b: output + 2.0 * (inputs[0] @ a.T) @ b.T
            )
    [prompt] = random_prompts([70])
    want = generated(model, prompt)
    with made(folder, enable_lora=True) as llm:
        before = tokens(llm, [prompt])
        request = LoRARequest("mine", 1, path)
        [found] = llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=request)
    assert found.outputs[0].token_ids == want != before[0]


# ---- weights that are quantized as they are loaded ---------------------------------------


@pytest.fixture
def plain(tmp_path):
    if not is_installed("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    tiny_model(intermediate_size=128, attention_bias=True).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_at_loading_are_those_of_transformers(plain, dtype):
    as_torch = getattr(torch, dtype)
    config = four_bits(bnb_4bit_compute_dtype=as_torch)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=as_torch)
    prompts = random_prompts([3, 70])
    with made(plain, quantization="bitsandbytes", dtype=dtype) as llm:
        assert tokens(llm, prompts) == [generated(model, prompt) for prompt in prompts]
        stats = llm.stats()
    whole = sum(parameter.nbytes for parameter in load(plain, as_torch).model.parameters())
    assert stats["quantization"] == "bitsandbytes" and stats["weight_bytes"] < 0.5 * whole


def test_the_calibration_of_four_bits_is_that_of_the_weights_before(plain):
    basis = calibrate(
        loader.LoadedModel("tiny", load(plain).model, by_letter, load(plain).geometry),
        ["x y z " * 200],
    )
    with made(plain, quantization="bitsandbytes", kv_format=NEAR, calibration=basis) as llm:
        assert len(tokens(llm, random_prompts([700]))[0]) == 12


def test_a_row_that_is_no_whole_number_of_blocks_is_refused(plain):
    tiny_model(intermediate_size=96).save_pretrained(plain)
    with pytest.raises(UnsupportedModelError, match="multiple of 64 weights.*fp8-emulated"):
        made(plain, quantization="bitsandbytes")
