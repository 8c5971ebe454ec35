"""A family with attention sinks and windows of 128: its batches, its calibration, and refusals."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from spectral_paged.cache import SpectralKVCache
from spectral_paged.errors import FormatError
from spectral_paged.integrations.cached_attention import ATTENTION_NAME
from spectral_paged.models.calibration import calibrate
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from support.families import build, generate, llm_of, reference
from support.tiny_model import random_prompts

NAME = "gpt_oss"


def test_sinks_of_the_small_model_count():
    own, ids = build(NAME), torch.tensor(random_prompts([300], seed=2))
    with torch.no_grad():
        want = own(ids).logits[0]
        for layer in own.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
        without = own(ids).logits[0]
    assert float((want - without).abs().amax(-1).median()) > 0.2 * float(want.std())


@pytest.mark.parametrize("format", ["exact", "spectral-int8"])
def test_a_batch_changes_no_token(format):
    """Around a window of 128, and before and behind the first page."""
    model, prompts = build(NAME), random_prompts([1, 127, 128, 129, 700, 1200], seed=7)
    llm = llm_of(model, kv_format=format, prefill_segment=512, enable_prefix_caching=False)
    assert generate(llm, prompts) == [generate(llm, [prompt])[0] for prompt in prompts]
    assert (llm.stats()["pages_attended"] > 0) == (format != "exact")


def test_a_calibration_sees_what_the_model_attends_to():
    """Its forward is transformers' own, sinks included: later layers see what earlier ones give."""
    seen, own = [], build(NAME)
    ids = random_prompts([1100], seed=9)[0]
    own.model.norm.register_forward_hook(lambda *found: seen.append(found[2]))
    geometry = ModelGeometry.from_config(own.config)
    calibrate(LoadedModel(NAME, own, lambda _: {"input_ids": ids}, geometry), ["text"])
    with torch.no_grad():
        own.model(torch.tensor([ids[:1088]]))
    recorded, want = seen
    assert float((recorded - want).abs().max()) < 1e-3 * float(want.std())


def sink_cache(has_sinks):
    return SpectralKVCache(
        num_layers=1,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=None,
        format="exact",
        max_model_len=256,
        kv_cache_bytes=1 << 20,
        max_num_seqs=2,
        attention_sinks=has_sinks,
    )


@pytest.mark.parametrize("made_with", [True, False])
def test_a_cache_and_its_caller_agree_on_sinks(made_with):
    cache = sink_cache(made_with)
    heads, dim = cache.format.num_kv_heads, cache.format.head_dim
    cache.begin_step(cache.reserve({"s": 3}))
    q, k = torch.randn(3, cache.num_q_heads, dim), torch.randn(3, heads, dim)
    sinks = torch.zeros(cache.num_q_heads)
    remedy = "pass each layer's sinks" if made_with else "make it with attention_sinks=True"
    with pytest.raises(FormatError, match=remedy):
        cache.attend(0, q, k, k, None if made_with else sinks)
    cache.attend(0, q, k, k, sinks if made_with else None)


def test_sinks_of_a_wrong_number_are_refused():
    cache = sink_cache(True)
    heads, dim = cache.format.num_kv_heads, cache.format.head_dim
    cache.begin_step(cache.reserve({"s": 1}))
    q, k = torch.randn(1, cache.num_q_heads, dim), torch.randn(1, heads, dim)
    with pytest.raises(FormatError, match=rf"sinks of shape \[{cache.num_q_heads}\].*\[1\]"):
        cache.attend(0, q, k, k, torch.zeros(1))


def test_transformers_models_without_our_cache_have_their_sinks():
    """By the attention that reads a `SpectralPagedCache`, in a forward that has none."""
    own, ids = build(NAME), torch.tensor(random_prompts([300], seed=3))
    with torch.no_grad():
        want = own(ids).logits
        own.set_attn_implementation(ATTENTION_NAME)
        assert torch.allclose(own(ids).logits, want, atol=1e-4)


def test_experts_in_mxfp4_are_unpacked_by_transformers_and_served(tmp_path):
    """Codes of 4 bits, two a byte, and a power of two for each 32, as OpenAI publishes them."""
    own = build(NAME).bfloat16()
    own.config.quantization_config = {"quant_method": "mxfp4"}
    own.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = stored.pop(name).shape
        shape = experts, columns, rows // 32
        stored[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    unpacked = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=tf.Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    codes = stored["model.layers.0.mlp.experts.down_proj_blocks"][1, 2, 0]
    exponent = int(stored["model.layers.0.mlp.experts.down_proj_scales"][1, 2, 0]) - 127
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    sizes = torch.cat((sizes, -sizes)) * 2.0**exponent
    first = unpacked.model.layers[0].mlp.experts.down_proj[1, :32, 2].float()
    assert torch.equal(first[::2], sizes[(codes & 15).long()])
    assert torch.equal(first[1::2], sizes[(codes >> 4).long()])
    served, prompts = unpacked.float(), random_prompts([5, 200], seed=4)
    want = reference(served, prompts)
    assert generate(llm_of(served, kv_format="exact"), prompts) == want
