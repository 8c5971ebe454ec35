"""Each key and tensor of a GGUF file is used, changes nothing, or is refused by name."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectral_paged import LLM, SamplingParams
from spectral_paged.errors import CorruptFileError, SpectralPagedError, UnsupportedModelError
from spectral_paged.models.gguf import GGUFFile, convert_gguf
from spectral_paged.models.loader import load_model
from support.gguf_files import (
    ARCHITECTURES,
    byte_level_keys,
    plan_of,
    sentencepiece_keys,
    tensors,
    whole_files,
    write_gguf,
)

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))


def logits(model):
    ids = torch.arange(3, 203).unsqueeze(0) % 250
    with torch.no_grad():
        return model(ids).logits


# ---- weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, tied",
    [(arch, tied) for arch in ARCHITECTURES for tied in (True, False) if tied or arch != "gemma2"],
)
def test_a_conversion_computes_what_transformers_reads_from_the_file(tmp_path, arch, tied):
    path = write_gguf(tmp_path / "model.gguf", arch, tied=tied)
    ours = AutoModelForCausalLM.from_pretrained(convert_gguf(path), dtype=torch.float32)
    # theirs has some keys of the class's defaults: heads of width 128, scores scaled for 256
    how = {} if arch in ("llama", "qwen2") else {"config": ours.config}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, **how
    )
    assert ours.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_generates(tmp_path, arch):
    path = write_gguf(tmp_path / "model.gguf", arch, tokenizer=sentencepiece_keys())
    llm = LLM(str(path), kv_format="exact", device="cpu", kv_cache_bytes=16 << 20)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate("the Paris is", params, use_tqdm=False)
    assert output.prompt_token_ids[0] == 1 and len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    "dtype, kept", [("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32")]
)
def test_weights_are_kept_in_the_type_that_loses_nothing(tmp_path, dtype, kept):
    norms = {name: np.ones_like(t) for name, t in tensors("qwen3", 264).items() if t.ndim == 1}
    path = write_gguf(tmp_path / "model.gguf", "qwen3", dtype=dtype, extra=norms)
    folder = convert_gguf(path)
    found = load_file(folder / "model.safetensors")
    matrices = {t.dtype for t in found.values() if t.ndim > 1}
    assert matrices == {getattr(torch, kept)}
    assert json.loads((folder / "config.json").read_text())["dtype"] in (kept, "float32")
    file = GGUFFile(path)
    held = found["model.layers.1.mlp.down_proj.weight"].float().numpy()
    assert (held == file.read("blk.1.ffn_down.weight")).all()


def test_quantized_weights_are_those_of_gguf(tmp_path):
    rng = np.random.default_rng(0)
    wide = {
        f"blk.{i}.ffn_{name}.weight": rng.standard_normal((64, 64)).astype(np.float32)
        for i in range(2)
        for name in ("up", "down", "gate")
    }
    keys = {"qwen3.feed_forward_length": 64}
    path = write_gguf(tmp_path / "model.gguf", "qwen3", dtype="q8_0", keys=keys, extra=wide)
    reader = gguf.GGUFReader(str(path))
    found = load_file(convert_gguf(path) / "model.safetensors")
    for tensor in reader.tensors:
        if "ffn_up" in tensor.name:
            name = f"model.layers.{tensor.name.split('.')[1]}.mlp.up_proj.weight"
            want = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(found[name].float(), torch.from_numpy(want))


def test_large_weights_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("spectral_paged.models.gguf.weights.SHARD_BYTES", 50_000)
    folder = convert_gguf(write_gguf(tmp_path / "model.gguf"))
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    held = [name for shard in shards for name in load_file(shard)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(held) == sorted(index) and len(set(held)) == len(held)
    load_model(str(tmp_path / "model.gguf"), **CPU)


# ---- tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_file_without_one_of_its_tensors_is_refused_with_its_name(tmp_path, arch):
    for name in tensors(arch, 264):
        if name == "output.weight":  # then the embeddings serve
            continue
        path = write_gguf(tmp_path / "lacks.gguf", arch, drop=[name])
        with pytest.raises(CorruptFileError, match=rf"lacks 1 of .*{name}"):
            convert_gguf(path)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.scale",
        "blk.0.attn_sinks.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.2.attn_norm.weight",
        "blk.x.attn_norm.weight",
        "blk.0.attn_output.bias",
        "output.bias",
        "rope_freqs.bias",
        "",
    ],
)
@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_a_tensor_that_the_model_does_not_use_is_refused_by_name(tmp_path, arch, name):
    path = write_gguf(tmp_path / "more.gguf", arch, extra={name: np.ones(64, np.float32)})
    with pytest.raises(UnsupportedModelError, match=rf"1 tensors .*\({name}\)"):
        convert_gguf(path)


@pytest.mark.parametrize(
    "name, shape", [("blk.1.attn_k.weight", (64, 32)), ("output_norm.weight", (63,))]
)
def test_a_tensor_of_another_shape_is_refused(tmp_path, name, shape):
    path = write_gguf(tmp_path / "odd.gguf", extra={name: np.ones(shape, np.float32)})
    with pytest.raises(CorruptFileError, match=rf"{name} has shape"):
        convert_gguf(path)


def test_biases_of_llama_are_used_and_turned_like_their_weights(tmp_path):
    rng = np.random.default_rng(3)
    sizes = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}
    biases = {
        f"blk.{i}.{name}.bias": rng.standard_normal(size).astype(np.float32)
        for i in range(2)
        for name, size in sizes.items()
    }
    model = load_model(str(write_gguf(tmp_path / "biased.gguf", extra=biases)), **CPU).model
    held = model.model.layers[1].self_attn
    want = biases["blk.1.attn_q.bias"].reshape(4, 8, 2).swapaxes(1, 2).reshape(64)
    assert (held.q_proj.bias.detach().numpy() == want).all()
    assert (held.o_proj.bias.detach().numpy() == biases["blk.1.attn_output.bias"]).all()


@pytest.mark.parametrize(
    "keys",
    [
        {"split.no": 0, "split.count": 2, "split.tensors.count": 40},
        {"split.no": 1, "split.count": 3},
        {"split.count": 1, "split.tensors.count": 22},
    ],
)
def test_one_part_of_several_is_refused_with_how_to_join_them(tmp_path, keys):
    with pytest.raises(CorruptFileError, match=r"part \d of \d.*llama-gguf-split --merge"):
        convert_gguf(write_gguf(tmp_path / "m-00001-of-00002.gguf", keys=keys))


def test_a_file_that_was_split_into_one_part_is_whole(tmp_path):
    count = len(tensors("llama", 264))
    keys = {"split.no": 0, "split.count": 1, "split.tensors.count": count}
    assert convert_gguf(write_gguf(tmp_path / "one.gguf", keys=keys))


# ---- keys --------------------------------------------------------------------------------

REFUSED = {  # each with a value that would change the model's computation or its tokens
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.scale": 0.5,
    "attention.value_length": 32,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "expert_count": 8,
    "expert_used_count": 2,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "logit_scale": 0.125,
    "nextn_predict_layers": 1,
    "pooling_type": 1,
    "use_parallel_residual": True,
    "vocab_size": 300,
    "rope.dimension_count": 8,
    "rope.scaling.type": "longrope",
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.yarn_attn_factor": 1.2,
    "tokenizer.ggml.add_sep_token": True,
    "tokenizer.ggml.remove_extra_whitespaces": True,
    "tokenizer.ggml.precompiled_charsmap": np.zeros(9, np.uint8),
    "tokenizer.ggml.suppress_tokens": np.array([3], np.int32),
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.pre": "nobody-knows",
    "adapter.type": "lora",
    "general.type": "adapter",
    "general.architecture": "rwkv6",
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_key_that_would_not_be_honoured_is_refused_by_name(tmp_path, arch, key):
    outside = key.startswith(("tokenizer.", "adapter.", "general."))
    full = key if outside else f"{arch}.{key}"
    with pytest.raises(UnsupportedModelError, match=full.replace(".", r"\.")) as found:
        plan = plan_of(arch, {full: REFUSED[key]})
        if key == "tokenizer.ggml.pre":  # looked up where the tokenizer is built
            from spectral_paged.models.gguf.tokenizer import build_tokenizer

            build_tokenizer(whole_files()[arch], plan.vocabulary)
    assert "take " in str(found.value), "an error names what to do"


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "attention.sliding_window_pattern"])
def test_what_gemma3_may_say_is_used_or_refused(key):
    if key.startswith("attn"):
        with pytest.raises(UnsupportedModelError, match="attn_logit_softcapping"):
            plan_of("gemma3", {f"gemma3.{key}": 50.0})
        return
    flags = np.array([False, True])
    config = plan_of("gemma3", {f"gemma3.{key}": flags}).config
    assert config.layer_types == ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedModelError, match="3 flags for 2 layers"):
        plan_of("gemma3", {f"gemma3.{key}": np.array([True] * 3)})


NAMES = st.text(st.sampled_from("abcdefg_.0"), min_size=1, max_size=12)
VALUES = st.one_of(st.integers(0, 9), st.booleans(), st.text(max_size=5), st.floats(0, 9))


@settings(deadline=None)
@given(arch=st.sampled_from(ARCHITECTURES), name=NAMES, value=VALUES)
def test_a_key_that_nobody_knows_is_refused_where_it_may_matter(arch, name, value):
    for prefix in (f"{arch}.", f"{arch}.attention.", f"{arch}.rope.", "tokenizer.ggml.", "split."):
        with pytest.raises(UnsupportedModelError, match="does not know"):
            plan_of(arch, {f"{prefix}x{name}": value})
    for prefix in ("general.", "quantize.imatrix.", "somebody."):
        plan_of(arch, {f"{prefix}x{name}": value})


@settings(deadline=None)
@given(arch=st.sampled_from(ARCHITECTURES), data=st.data())
def test_a_key_of_a_wrong_type_or_value_is_a_typed_error(arch, data):
    keys = [k for k in GGUFFile(whole_files()[arch]).metadata if k.startswith((arch, "tokenizer"))]
    key = data.draw(st.sampled_from(sorted(keys)))
    value = data.draw(
        st.sampled_from(
            [-1, 0, 1 << 63, "text", True, 1e38, float("nan"), [], np.zeros(0, np.int32)]
        )
    )
    try:
        plan_of(arch, {key: value})
    except SpectralPagedError as error:
        assert str(whole_files()[arch]) in str(error) or key in str(error)


@pytest.mark.parametrize(
    "key", ["embedding_length", "block_count", "context_length", "attention.layer_norm_rms_epsilon"]
)
def test_a_file_without_a_key_that_its_model_needs_is_refused(key):
    with pytest.raises(CorruptFileError, match=rf"qwen3\.{key} is missing"):
        plan_of("qwen3", {f"qwen3.{key}": None})


def test_lists_of_one_value_a_layer_count_as_that_value():
    plan = plan_of("llama", {"llama.attention.head_count_kv": np.array([2, 2], np.int32)})
    assert plan.config.num_key_value_heads == 2
    with pytest.raises(UnsupportedModelError, match="head_count_kv differs between layers"):
        plan_of("llama", {"llama.attention.head_count_kv": np.array([2, 1], np.int32)})


def test_what_a_file_asks_to_sample_with_is_in_the_generation_config(tmp_path):
    keys = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    folder = convert_gguf(write_gguf(tmp_path / "s.gguf", keys=keys))
    found = json.loads((folder / "generation_config.json").read_text())
    assert found["temperature"] == 0.5 and found["top_k"] == 20 and found["do_sample"] is True


def test_the_vocabulary_is_as_long_as_the_embeddings(tmp_path):
    tokenizer = byte_level_keys()
    longer = np.zeros((265, 64), np.float32)
    path = write_gguf(tmp_path / "v.gguf", tokenizer=tokenizer, extra={"token_embd.weight": longer})
    with pytest.raises(CorruptFileError, match=r"token_embd\.weight has shape \[265, 64\]"):
        convert_gguf(path)
