"""Packed layers: their matrix is read by products, and every tensor of theirs is known."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from spectral_paged import LLM, LoRARequest, PageFormat, SamplingParams
from spectral_paged.errors import InvalidRequestError, UnsupportedModelError
from spectral_paged.models.calibration import calibrate, model_fingerprint, output_moment
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.linear_weights import is_linear, is_plain, packed_layers, packed_matrix
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.parked_weights import ParkedWeights
from spectral_paged.models.stored_tensors import stored_bytes, stored_tensors
from spectral_paged.models.weights_digest import weights_digest
from spectral_paged.pages.shared_basis import COVARIANCES, METRICS
from support.lora_adapters import save_adapter
from support.tiny_model import random_prompts, tiny_model

CALIBRATED = PageFormat("s", 2, 16, ((16, 8),), ((16, 8),), basis="shared")


class Packed(nn.Module):
    """A layer as packages keep it: integer codes and scales of rows, in buffers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(-1, keepdim=True) / 7
        self.register_buffer("codes", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_parameter("bias", linear.bias)

    @property
    def matrix(self):
        return self.codes * self.scales

    def forward(self, inputs):
        return F.linear(inputs, self.matrix.to(inputs.dtype), self.bias)


class OfSteps(Packed):
    """A layer whose kernel takes rows of a batch alone, as steps have them."""

    def forward(self, inputs):
        if inputs.dim() != 3:
            raise RuntimeError("no kernel for this shape")
        return super().forward(inputs)


class OfTraining(Packed):
    def forward(self, inputs):
        if torch.is_inference_mode_enabled():
            raise RuntimeError("no inference tensors")
        return super().forward(inputs)


def by_letter(prompt):
    return {"input_ids": [ord(c) % 199 for c in prompt]}


def packed_model(kind=Packed, **changes):
    model = tiny_model(**changes)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, kind(module))
    return model


def dense_model(packed):
    """The model whose plain weights are what `packed` multiplies by."""
    model = copy.deepcopy(packed)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, Packed):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data, linear.bias = module.matrix, module.bias
            model.model.layers.set_submodule(name, linear)
    return model


def loaded(model):
    return LoadedModel("tiny", model, by_letter, ModelGeometry.from_config(model.config))


@pytest.mark.parametrize("width", [1, 7, 1024, 1030])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_is_read_bit_by_bit(width, bias, dtype):
    torch.manual_seed(width)
    linear = nn.Linear(width, 5, bias=bias)
    if bias:
        linear.bias.data.fill_(1e4)  # a sum with it would round the product away
    layer = Packed(linear)
    want = layer.matrix.to(dtype)
    found = packed_matrix(layer, dtype)
    assert found.dtype == dtype and torch.equal(found, want)
    assert not torch.signbit(found[found == 0]).any()
    columns = torch.arange(0, width, 3)
    assert torch.equal(packed_matrix(layer, dtype, columns), want[:, columns])
    assert (layer.bias is not None) == bias
    assert is_linear(layer) and not is_plain(layer) and is_plain(linear)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_less_than_16_bits_are_packed(dtype):
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    assert not is_plain(linear)
    model = tiny_model()
    assert not list(packed_layers(model))
    model.model.layers[1].mlp.up_proj = linear
    assert dict(packed_layers(model)) == {"model.layers.1.mlp.up_proj": linear}


def test_a_packed_model_is_calibrated_as_the_plain_model_that_it_stands_for():
    packed = packed_model()
    plain = dense_model(packed)
    found, want = output_moment(packed, 2, 16), output_moment(plain, 2, 16)
    assert torch.allclose(found, want, rtol=1e-12)
    found, want = (calibrate(loaded(m), ["x y z " * 200]) for m in (packed, plain))
    for name in COVARIANCES + METRICS:
        one, other = getattr(found, name), getattr(want, name)
        assert float((one - other).norm() / other.norm()) < 1e-5, name
    assert found.num_tokens == want.num_tokens
    assert found.model_fingerprint == model_fingerprint(packed)


def test_a_packed_models_fingerprint_is_of_what_it_multiplies_by():
    model = packed_model(attention_bias=True)
    seen = {model_fingerprint(model)}
    assert model_fingerprint(copy.deepcopy(model).bfloat16()) in seen, "one in every dtype"
    for place, change in ((0, "codes"), (1, "scales"), (7, "bias")):
        other = copy.deepcopy(model)
        projection = other.model.layers[1].self_attn.k_proj
        getattr(projection, change).data[place] *= -1
        seen.add(model_fingerprint(other))
    other = copy.deepcopy(model)
    for layer in other.model.layers:  # as long as a power of two counts
        layer.self_attn.v_proj.scales *= 2.0**8
    seen.add(model_fingerprint(other))
    assert len(seen) == 5


GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def llm(model, **options):
    return LLM.from_model(model, by_letter, kv_cache_bytes=16 << 20, **options)


def test_auto_takes_pages_without_a_calibration_where_none_can_be_made(caplog, monkeypatch):
    monkeypatch.setattr("spectral_paged.llm.end_tokens", lambda *_: ())
    model = packed_model(head_dim=64)
    model.model.layers[1].self_attn.o_proj = OfSteps(nn.Linear(256, 64))
    with caplog.at_level(logging.WARNING):
        made = llm(model)
    assert made.cache.format.name == "spectral-page"
    [said] = [r.getMessage() for r in caplog.records if "kv_format" in r.getMessage()]
    assert "quantized" in said and "OfSteps: no kernel for this shape" in said
    made.close()
    with pytest.raises(
        InvalidRequestError, match=r"quantized \(packed\).*no kernel.*spectral-page"
    ):
        llm(model, kv_format="spectral-quality")


def test_layers_that_cannot_multiply_as_steps_do_are_refused_at_the_start():
    model = packed_model()
    model.model.layers[1].mlp.up_proj = OfTraining(nn.Linear(64, 96))
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    with pytest.raises(UnsupportedModelError, match=r"1.mlp.up_proj, a OfTraining .*no infe"):
        llm(model, kv_format="exact")


def test_a_packed_model_that_can_be_read_takes_calibrated_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("spectral_paged.llm.end_tokens", lambda *_: ())
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))
    monkeypatch.setattr("spectral_paged.models.calibration.DEFAULT_SPANS", 1)
    with llm(packed_model(head_dim=64)) as made:
        assert made.cache.format.name == "spectral-quality" and made.cache.format.basis_id
    assert [p.suffix for p in tmp_path.rglob("*.*")].count(".safetensors") == 1


def test_a_packed_model_says_with_calibrated_pages_what_its_plain_one_says(monkeypatch):
    packed = packed_model()
    prompts, basis = random_prompts([3, 700]), calibrate(loaded(packed), ["x y z " * 200])
    said = []
    for model, given in ((packed, basis), (dense_model(packed), "online")):
        format = CALIBRATED if given is basis else "exact"
        made = LLM.from_model(model, kv_format=format, calibration=given, kv_cache_bytes=16 << 20)
        said.append(
            [o.outputs[0].token_ids for o in made.generate(prompts, GREEDY, use_tqdm=False)]
        )
        made.close()
    assert said[0] == said[1]


def test_adapters_are_added_to_layers_of_any_class(tmp_path):
    packed, path = packed_model(), save_adapter(tmp_path, targets=("q_proj", "down_proj"))
    prompts, said, plain = random_prompts([70]), [], dense_model(packed)
    own, other = map(model_fingerprint, (packed, plain))
    for model in (packed, plain):
        options = {"kv_format": "exact", "kv_cache_bytes": 16 << 20, "enable_lora": True}
        with LLM.from_model(model, **options) as made:
            for request in (LoRARequest("mine", 1, path), None):
                [found] = made.generate(prompts, GREEDY, use_tqdm=False, lora_request=request)
                said.append(found.outputs[0].token_ids)
            assert model_fingerprint(model) == (own if model is packed else other)
    assert said[0] == said[2] != said[1] == said[3]


# ---- stored tensors ----------------------------------------------------------------------


def wrapped_model():
    """A model one of whose weights is a tensor subclass of two tensors."""
    model = tiny_model()
    projection = model.model.layers[0].self_attn.k_proj
    weight = projection.weight.detach()
    projection.weight = nn.Parameter(TwoTensor(weight.clone(), weight * 2), requires_grad=False)
    return model


def test_tensors_inside_and_beside_weights_are_stored():
    model = wrapped_model()
    projection = model.model.layers[1].self_attn.v_proj
    scales = {name: torch.ones(3) for name in ("absmax", "code", "nested", "nested code")}
    inner = type("State", (), {"absmax": scales["nested"], "code": scales["nested code"]})()
    projection.weight.quant_state = type(
        "State", (), {"absmax": scales["absmax"], "code": scales["code"], "state2": inner}
    )()
    eight = model.model.layers[0].mlp.up_proj
    eight.weight.SCB = torch.ones(96)
    names = {id(t): name for name, t in stored_tensors(model)}
    for tensor in (*scales.values(), eight.weight.SCB):
        assert "weight" in names[id(tensor)]
    kept = model.model.layers[0].self_attn.k_proj.weight
    assert {id(kept.a), id(kept.b)} <= set(names) and id(kept) not in names
    extra = 2 * kept.a.nbytes - kept.a.nbytes + 4 * 12 + 96 * 4
    assert stored_bytes(model) == sum(p.nbytes for p in tiny_model().parameters()) + extra
    before = weights_digest(model, ())
    for tensor in (*scales.values(), eight.weight.SCB, kept.b):
        tensor.view(-1)[0] += 1
        after = weights_digest(model, ())
        assert after != before
        before = after
    eight.state = type("State", (), {"SCB": eight.weight.SCB})()  # as the first product moves it
    eight.weight.SCB = None
    assert weights_digest(model, ()) == before


def test_packed_weights_are_parked_and_come_back():
    model = wrapped_model()
    tensors = [tensor for _, tensor in stored_tensors(model)]
    before = [tensor.clone() for tensor in tensors]
    parked = ParkedWeights(model)
    assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
    parked.restore()
    assert all(map(torch.equal, tensors, before))
