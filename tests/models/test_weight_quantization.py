"""FP8 weights: what rounding costs, where it is refused, and what is left as it was."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from spectral_paged import LLM, PageFormat, SamplingParams
from spectral_paged.cli.commands import main
from spectral_paged.errors import InvalidRequestError, SpectralPagedError, UnsupportedModelError
from spectral_paged.models import calibration, fp8_linear, loader, weight_quantization
from spectral_paged.models.calibration import calibrate, fingerprint_of, model_fingerprint
from spectral_paged.models.fp8_linear import (
    LARGEST,
    FP8Linear,
    emulated_product,
    scaled_product,
    to_fp8,
)
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.weight_quantization import check_device, quantized
from support.real_text import smollm2, text
from support.tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model

CPU = torch.device("cpu")
EMULATED = "fp8-emulated"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SHARED = PageFormat("s", 2, 16, ((16, 4),), ((16, 4),), basis="shared")


def by_letter(prompt):
    """A tokenizer: one token a letter."""
    return {"input_ids": [ord(c) % 199 for c in prompt]}


def tiny(tokenizer=None, **changes):
    model = tiny_model(**changes)
    return LoadedModel("tiny", model, tokenizer, ModelGeometry.from_config(model.config))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint in bf16, whose tokenizer has a token a letter."""
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# ---- rounding ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.floats(-30, 30),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_an_element_is_rounded_within_its_bound(rows, width, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, width, generator=generator) * 10.0**exponent).to(dtype)
    values[0, ::2] = 0
    codes, scales = to_fp8(values)
    wide = values.float()
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (rows, 1)
    error = (codes.float() * scales - wide).abs()
    assert bool((error <= torch.maximum(wide.abs() / 16, scales / 1024) * 1.0001).all())
    assert torch.equal(codes.float() == 0, (wide / scales).abs() <= 2**-10)
    largest = codes.float().abs().amax(-1)
    assert bool(((largest == LARGEST) | (wide.abs().amax(-1) == 0)).all())


def test_a_row_of_zeros_stays_zero_and_one_of_nan_stays_nan():
    values = torch.zeros(3, 7)
    values[1, 2] = float("nan")
    codes, scales = to_fp8(values)
    assert not codes.float()[[0, 2]].any() and bool((scales[[0, 2]] > 0).all())
    assert bool((codes.float() * scales)[1].isnan().any())


SIZES = [(1, 16, 16, 0), (1, 48, 32, 1), (7, 80, 16, 1), (64, 96, 112, 0), (65, 208, 48, 1)]


def random_linear(inputs, outputs, bias):
    linear = nn.Linear(inputs, outputs, bias=bool(bias))
    with torch.no_grad():
        linear.weight *= torch.logspace(-3, 2, outputs)[:, None]  # each output has a scale
    return linear


@pytest.mark.parametrize("num_tokens, inputs, outputs, bias", SIZES)
def test_a_product_differs_by_no_more_than_its_terms_were_rounded(
    num_tokens, inputs, outputs, bias
):
    torch.manual_seed(num_tokens)
    linear = random_linear(inputs, outputs, bias)
    layer = FP8Linear(linear, CPU, emulated=True)
    x = torch.randn(2, num_tokens, inputs) * torch.logspace(-2, 3, num_tokens)[:, None]
    with torch.no_grad():
        want, got = linear(x), layer(x)
        each = torch.maximum(x.abs() / 16, x.abs().amax(-1, keepdim=True) / LARGEST / 1024)
        weight = linear.weight.abs()
        other = torch.maximum(weight / 16, layer.weight_scale / 1024)
        bound = (x.abs() + each) @ (weight + other).T - x.abs() @ weight.T
    assert got.shape == want.shape and got.dtype == want.dtype
    assert bool(((got - want).abs() <= bound * 1.01 + 1e-6 * want.abs()).all())
    error = (got - want).norm() / want.norm()
    assert 0 < error < 0.06, "rounding errors average out"


@pytest.mark.parametrize("num_tokens, inputs, outputs, bias", SIZES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_torchs_scaled_product_is_the_emulated_one(num_tokens, inputs, outputs, bias, dtype, bound):
    """`torch._scaled_mm` multiplies on a CPU too; this holds it to the same scales and order."""
    torch.manual_seed(num_tokens)
    codes, scales = to_fp8(torch.randn(num_tokens, inputs))
    weight, weight_scale = to_fp8(random_linear(inputs, outputs, bias).weight.detach())
    want = emulated_product(codes, scales, weight, weight_scale, torch.float32)
    got = scaled_product(codes, scales, weight, weight_scale, dtype)
    assert got.dtype == dtype
    size = emulated_product(codes.abs(), scales, weight.abs(), weight_scale, torch.float32)
    assert bool(((got.float() - want).abs() <= bound * size).all())


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("bias", [0, 1])
def test_a_compiled_layer_has_no_graph_break_and_any_number_of_tokens(emulated, bias):
    layer = FP8Linear(random_linear(48, 32, bias), CPU, emulated=emulated)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for num_tokens in (1, 5, 9, 64):
            x = torch.randn(1, num_tokens, 48)
            assert torch.allclose(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


# ---- models ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_of_the_decoder_are_quantized_and_nothing_else(tied):
    loaded = tiny(tie_word_embeddings=tied, attention_bias=True)
    before = copy.deepcopy(loaded.model)
    found = quantized(loaded, EMULATED, CPU)
    kinds = {type(m) for m in found.model.model.layers.modules() if hasattr(m, "in_features")}
    assert kinds == {FP8Linear} and type(found.model.lm_head) is nn.Linear
    changed = 0
    for name, parameter in before.named_parameters():
        if "_proj.weight" in name:
            layer = found.model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(layer.weight.float(), to_fp8(parameter)[0].float())
            changed += 1
        else:
            assert torch.equal(found.model.get_parameter(name), parameter)
    assert changed == 7 * 2


def test_one_matrix_at_a_time_is_held_in_both_forms(monkeypatch):
    loaded, round_rows, left = tiny(), to_fp8, []
    linears = [m for m in loaded.model.model.layers.modules() if isinstance(m, nn.Linear)]
    alive = [weakref.ref(linear.weight) for linear in linears]
    del linears

    def counted(rows):
        left.append(sum(ref() is not None for ref in alive))
        return round_rows(rows)

    monkeypatch.setattr(fp8_linear, "to_fp8", counted)
    quantized(loaded, EMULATED, CPU)
    assert left == list(range(len(alive), 0, -1))
    assert not any(ref() is not None for ref in alive)


def test_stats_say_how_weights_are_kept_and_how_many_bytes_they_take(folder):
    def stats(**options):
        with LLM(folder, kv_format="exact", kv_cache_bytes=1 << 20, **options) as llm:
            return llm.stats()

    plain, fp8 = stats(dtype="bfloat16"), stats(dtype="bfloat16", quantization=EMULATED)
    assert plain["quantization"] is None and fp8["quantization"] == EMULATED
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    outputs = 2 * (64 + 2 * 32 + 64 + 2 * 96 + 64)
    assert plain["weight_bytes"] - fp8["weight_bytes"] == linear - 4 * outputs


@pytest.mark.parametrize("format", ["exact", "spectral-int8"])
def test_a_batch_of_fp8_says_what_each_says_alone(format):
    llm = LLM(
        quantized(tiny(), EMULATED, CPU),
        quantization=EMULATED,
        kv_format=tiny_format(format),
        kv_cache_bytes=16 << 20,
    )
    prompts = random_prompts([1, 64, 577, 1217])
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    llm.cache.reset_prefix_cache()
    for prompt, output in zip(prompts, together):
        [alone] = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
    plain = tiny_llm(tiny_format(format)).generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in plain] != [o.outputs[0].token_ids for o in together]


@pytest.mark.model
def test_fp8_weights_leave_a_real_model_its_words():
    """Against fp32 over 512 tokens: mean KL below 0.05 nats, 86 % of most likely tokens equal."""
    loaded = smollm2()
    found = quantized(replace(loaded, model=copy.deepcopy(loaded.model)), EMULATED, CPU)
    ids = torch.tensor([loaded.tokenizer(text("alice")[:3000])["input_ids"][:512]])
    with torch.inference_mode():
        want, got = (m.model(ids).logits[0].log_softmax(-1) for m in (loaded, found))
    divergence = float((want.exp() * (want - got)).sum(-1).mean())
    assert 0 < divergence < 0.05
    assert float((want.argmax(-1) == got.argmax(-1)).float().mean()) > 0.86


# ---- calibration -------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch):
    """A tokenizer of letters for every model, and a line for each calibration made."""
    made = []

    def short(loaded, texts, *, max_spans, progress, device=None):
        made.append(loaded.quantization)
        return calibrate(loaded, texts, max_spans=1, device=device)

    monkeypatch.setattr(calibration, "calibrate", short)
    monkeypatch.setattr(loader, "load_tokenizer", lambda *_, **__: by_letter)
    return made


def test_the_calibration_is_that_of_the_weights_before(folder, spans, monkeypatch):
    monkeypatch.setattr("spectral_paged.llm.Engine", lambda *_, **__: None)
    monkeypatch.setattr("spectral_paged.llm.end_tokens", lambda *_: ())

    def basis_id(**options):
        llm = LLM(folder, kv_format=SHARED, kv_cache_bytes=8 << 20, **options)
        return llm.cache.format.basis_id

    first = basis_id(quantization=EMULATED)
    assert first and basis_id() == basis_id(quantization=EMULATED) == first
    assert spans == [None], "made once, and not of FP8 weights"
    base = loader.load_model(folder, device=CPU, dtype=torch.bfloat16)
    own = calibrate(base, ["x y z " * 200])
    assert basis_id(quantization=EMULATED, calibration=own) == basis_id(calibration=own) != first


def test_a_quantized_model_keeps_its_fingerprint_and_is_not_calibrated_again():
    loaded = tiny(by_letter)
    own = model_fingerprint(loaded.model)
    found = quantized(loaded, EMULATED, CPU)
    assert fingerprint_of(found) == own != model_fingerprint(found.model)
    with pytest.raises(InvalidRequestError, match=r"quantized \(torch.float8_e4m3fn\)"):
        calibrate(found, ["text"])


# ---- refusals ----------------------------------------------------------------------------


def door_llm(method):
    LLM("no-such-model", quantization=method, device="cpu")


def door_generate(method):
    return ["generate", "--device", "cpu", "-i", "in.jsonl", "-o", "o.jsonl", "-q", method]


def door_serve(method):
    return ["serve", "no-such-model", "--device", "cpu", "--quantization", method]


@pytest.mark.parametrize(
    "method, message",
    [
        ("fp9", "quantization is 'fp9'; it must be None or one of fp8, .*did you mean 'fp8'"),
        ("fp8_emulated", "did you mean 'fp8-emulated'"),
        ("awq", "it must be None or one of fp8, fp8-emulated, bitsandbytes, which quantize 16-bit"),
        ("fp8", "8.9 or more .*device is cpu: leave it out, or take quantization='fp8-emulated'"),
    ],
)
def test_every_door_refuses_before_a_model_is_looked_for(
    method, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InvalidRequestError, match=message) as caught:
        door_llm(method)
    for door in (door_generate, door_serve):
        assert main(door(method)) == 2
        assert str(caught.value) in capsys.readouterr().err


@pytest.mark.parametrize("value", [True, 8, ["fp8"]])
def test_a_quantization_of_another_type_is_refused(value):
    with pytest.raises(InvalidRequestError, match="quantization is .*; it must be a text or None"):
        LLM("no-such-model", quantization=value)


@pytest.mark.parametrize(
    "capability, dtype, message",
    [
        ((8, 0), torch.bfloat16, "and Old Card has 8.0: leave it out, or take .*fp8-emulated"),
        ((8, 6), torch.bfloat16, "and Old Card has 8.6"),
        ((8, 9), torch.float16, "are bfloat16, and dtype is float16: take dtype='bfloat16'"),
        ((9, 0), torch.float32, "are bfloat16, and dtype is float32"),
        ((8, 9), torch.bfloat16, None),
        ((9, 0), torch.bfloat16, None),
        ((12, 0), torch.bfloat16, None),
    ],
)
def test_a_gpu_is_asked_for_its_capability(monkeypatch, capability, dtype, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old Card")
    if message is None:
        check_device("fp8", torch.device("cuda"), dtype)
    else:
        with pytest.raises(InvalidRequestError, match=message):
            check_device("fp8", torch.device("cuda"), dtype)
    check_device(EMULATED, torch.device("cuda"), dtype)


def test_matrices_too_odd_for_tensor_cores_are_named(monkeypatch):
    monkeypatch.setattr(weight_quantization, "check_device", lambda *_: None)
    loaded = tiny(intermediate_size=100)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.gate_proj is 100 x 64.*16"):
        quantized(loaded, "fp8", CPU)
    assert not any(isinstance(m, FP8Linear) for m in loaded.model.modules()), "untouched"
    quantized(loaded, EMULATED, CPU)


def test_a_model_that_is_loaded_already_is_not_quantized_behind_its_back():
    with pytest.raises(TypeError, match="from_model takes no quantization"):
        tiny_llm(quantization=EMULATED)
    for loaded, method in [(tiny(), EMULATED), (quantized(tiny(), EMULATED, CPU), None)]:
        with pytest.raises(SpectralPagedError, match="tiny is loaded already, with"):
            LLM(loaded, quantization=method)
