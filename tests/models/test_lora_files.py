"""Folders of PEFT are read as PEFT reads them, or refused by name with a way out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_paged import LLM, LoRARequest
from spectral_paged.errors import AdapterError
from spectral_paged.models.lora import read_folder
from support.lora_adapters import ALL_LINEAR, save_adapter
from support.tiny_model import tiny_model


def rewrite(folder, *, config=None, tensors=None):
    """Change fields of a saved adapter's config, and its tensors by a function."""
    folder = Path(folder)
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)
    return str(folder)


def renamed(old, new):
    return lambda found: {name.replace(old, new): tensor for name, tensor in found.items()}


def without(part):
    return lambda found: {name: tensor for name, tensor in found.items() if part not in name}


def with_first(change):
    def changed(found):
        name = min(found)
        return found | {name: change(found[name]).contiguous()}

    return changed


def with_all(change):
    return lambda found: {name: change(t).contiguous() for name, t in found.items()}


def with_value(value):
    def spoil(tensor):
        tensor[0, 0] = value
        return tensor

    return with_first(spoil)


CONFIGS = [
    ({"peft_type": "IA3"}, "of type 'IA3', and LORA is served"),
    ({"peft_type": None}, "of type 'None'"),
    ({"use_dora": True}, "use_dora True: it is a DoRA adapter.*merge_and_unload"),
    ({"bias": "all"}, "has bias 'all'.*merge_and_unload"),
    ({"lora_bias": True}, "its B has a bias"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]: it replaces whole"),
    ({"layer_replication": [[0, 1]]}, "repeats layers"),
    ({"target_parameters": ["x"]}, "no linear layers"),
    ({"trainable_token_indices": [3]}, "embeddings of tokens"),
    ({"init_lora_weights": "pissa"}, "'pissa', which changed the weights of the base"),
    ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ({"r": 0}, r"has ranks \[0\], which are no integers"),
    ({"r": "4"}, r"has ranks \['4'\]"),
    ({"r": None}, r"has ranks \[None\]"),
    ({"lora_alpha": None}, "no numbers by names"),
    ({"alpha_pattern": {"q_proj": "x"}}, "no numbers by names"),
    ({"alpha_pattern": {"(": 1}}, "no numbers by names"),
    ({"alpha_pattern": {"(?i)q_proj": 1}}, "no numbers by names.*no regular expression"),
    ({"alpha_pattern": ["q_proj"]}, "no numbers by names"),
    ({"alpha_pattern": {"q{99999999999}": 1}}, "no regular expression"),
    ({"lora_alpha": True}, "no numbers by names"),
    ({"lora_alpha": 10**400}, "no numbers by names"),
    ({"lora_alpha": math.inf}, "no numbers by names"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "no numbers by names"),
    ({"r": True}, r"has ranks \[True\], which are no integers"),
    ({"r": 4.0}, r"has ranks \[4.0\], which are no integers"),
    ({"r": 10**400}, "has rank an integer of 1329 bits, and max_lora_rank is 16"),
    ({"rank_pattern": {"(?i)q_proj": 4}}, "no regular expression"),
    ({"rank_pattern": [4]}, r"has ranks \[4, \[4\]\]"),
    ({"rank_pattern": {"q_proj": "4"}}, r"has ranks \[4, '4'\]"),
    ({"use_rslora": "no"}, "has use_rslora 'no', which PEFT does not write"),
    ({"init_lora_weights": ["pissa"]}, r"has init_lora_weights \['pissa'\], which PEFT"),
    ({"target_modules": "q_proj("}, r"has target_modules 'q_proj\(', which PEFT"),
    ({"target_modules": ["q_proj", 5]}, "has target_modules .*, which PEFT does not"),
    ({"exclude_modules": 5}, "has exclude_modules 5, which PEFT does not"),
    ({"r": 17}, "has rank 17, and max_lora_rank is 16: give max_lora_rank=17"),
    ({"rank_pattern": {"q_proj": 32}}, "has rank 32"),
]


@pytest.mark.parametrize(
    "config, says", CONFIGS, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(CONFIGS)]
)
def test_what_is_not_served_is_refused_by_its_config(config, says, tmp_path):
    folder = rewrite(save_adapter(tmp_path / "a"), config=config)
    with pytest.raises(AdapterError, match=f"adapter 'x' .*{says}"):
        read_folder("x", folder, 16)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=says):  # before weights are read, of the model as well
        LLM("no such model", enable_lora=True, lora_modules=[f"x={folder}"])


@pytest.mark.parametrize("begins", [True, False, "gaussian", "orthogonal", "eva", None])
def test_beginnings_that_leave_the_base_alone_are_served(begins, tmp_path):
    folder = save_adapter(tmp_path, init_lora_weights=begins, use_dora=False, modules_to_save=None)
    assert read_folder("x", folder, 16).rank == 4


TENSORS = [
    (renamed("lora_A.weight", "lora_magnitude_vector"), "lora_magnitude_vector', and A and B"),
    (renamed("lora_A.weight", "lora_embedding_A"), "lora_embedding_A'"),
    (renamed("base_model.model.", ""), "has tensor 'model.layers"),
    (without("lora_B"), "has one of A and B in model.layers.0.self_attn.q_proj"),
    (without("lora"), "has no tensors of linear layers"),
    (with_value(math.nan), "NaN or Inf in model.layers.0"),
    (with_value(-math.inf), "NaN or Inf"),
    (with_first(lambda t: t[:-1]), "have no rank in common"),
    (with_first(torch.flatten), "have no rank in common"),
    (with_first(lambda t: t.sum()), r"has lora_A \[\] and .* have no rank in common"),
    (with_all(lambda t: t[:0] if t.shape[0] == 4 else t[:, :0]), "have no rank in common"),
    (
        with_all(lambda t: t[:2] if t.shape[0] == 4 else t[:, :2]),
        "has rank 2 in .* rank 4 there by",
    ),
    (with_first(lambda t: t.to(torch.float8_e4m3fn)), "has F8_E4M3 numbers in model.layers.0"),
    (with_first(lambda t: t.to(torch.complex64)), "has C64 numbers in model.layers.0"),
    (with_first(torch.Tensor.bool), "has BOOL numbers"),
    (with_first(torch.Tensor.char), "has I8 numbers in .* F16, BF16, F32, F64 are served"),
]


@pytest.mark.parametrize("change, says", TENSORS)
def test_tensors_that_are_not_of_lora_alone_are_refused(change, says, tmp_path):
    folder = rewrite(save_adapter(tmp_path), tensors=change)
    with pytest.raises(AdapterError, match=says):
        read_folder("x", folder, 16)


def test_a_rank_is_that_of_the_tensors_too(tmp_path):
    folder = rewrite(save_adapter(tmp_path, rank=8), config={"r": 4})
    with pytest.raises(AdapterError, match="has rank 8, and max_lora_rank is 4"):
        read_folder("x", folder, 4)


def spoiled(name, data):
    def spoil(folder):
        (folder / name).write_bytes(data)

    return spoil


FILES = [
    (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json: name the folder"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors: fetch"),
    (spoiled("adapter_config.json", b"{"), "adapter_config.json in .* cannot be read"),
    (spoiled("adapter_config.json", b"\xff\xfe"), "cannot be read"),
    (spoiled("adapter_config.json", b"[1]"), "it is no object"),
    (spoiled("adapter_config.json", b"[" * 100_000), "cannot be read .*recursion limit"),
    (spoiled("adapter_config.json", b'{"r": ' + b"9" * 5000 + b"}"), "cannot be read"),
    (spoiled("adapter_model.safetensors", b"no tensors"), "safetensors in .* cannot be read"),
    (spoiled("adapter_model.safetensors", b""), "safetensors in .* cannot be read"),
]


@pytest.mark.parametrize("spoil, says", FILES)
def test_files_that_are_missing_or_damaged_are_named(spoil, says, tmp_path):
    folder = save_adapter(tmp_path)
    spoil(tmp_path)
    with pytest.raises(AdapterError, match=says):
        read_folder("x", folder, 16)


def test_a_pickle_is_not_read(tmp_path):
    folder = save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="whose code would run: load it with PEFT, and save it"):
        read_folder("x", folder, 16)


PATHS = ["x" * 5000, "/" + "y/" * 3000, "~nobody-here/adapter", "a\0b", "\udcff"]


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_a_path_that_is_none_is_no_folder(path):
    with pytest.raises(AdapterError, match="there is no folder"):
        read_folder("x", path, 16)


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_adapter(tmp_path / "a")
    assert read_folder("x", "~/a", 16).rank == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floats_of_any_width_are_served(dtype, tmp_path):
    want = read_folder("x", save_adapter(tmp_path / "a"), 16)
    folder = save_adapter(tmp_path / "b")
    got = read_folder("x", rewrite(folder, tensors=with_all(lambda t: t.to(dtype))), 16)
    for name, layer in want.layers.items():
        for mine, theirs in zip(got.layers[name].factors(torch.float32), layer.factors(dtype)):
            assert torch.equal(mine.to(dtype), theirs.to(dtype))


@pytest.mark.parametrize(
    "change, says",
    [
        (
            renamed("self_attn.q_proj", "self_attn.c_attn"),
            "'model.layers.0.self_attn.c_attn'.*q_proj",
        ),
        (renamed("model.layers.0.self_attn.q_proj", "lm_head"), "targets 'lm_head'.*merge_and"),
        (renamed("layers.1.", "layers.2."), "targets 'model.layers.2"),
        (with_first(lambda t: t[:, :32]), "made for 64 x 32 weights in .*has 64 x 64: take the"),
        (
            with_first(lambda t: t.double() * 1e200),
            "too large for the model's torch.float32, .* 2:",
        ),
    ],
)
def test_layers_that_the_model_does_not_have_are_named(change, says, tmp_path):
    folder = rewrite(save_adapter(tmp_path), tensors=change)
    llm = LLM.from_model(tiny_model(), kv_format="exact", kv_cache_bytes=16 << 20, enable_lora=True)
    for _ in range(2):  # nothing is taken by the first
        with pytest.raises(AdapterError, match=says):
            llm.add_lora(LoRARequest("x", 1, folder))
    assert llm.list_loras() == []
    llm.add_lora(LoRARequest("x", 1, save_adapter(tmp_path / "good")))


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_rslora": True, "alpha": 3}])
def test_patterns_and_scales_are_those_of_peft(config, tmp_path):
    peft = pytest.importorskip("peft")
    alpha = config.pop("alpha", 16)
    asked = peft.LoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=list(ALL_LINEAR),
        rank_pattern={"down_proj": 3, "layers.1.self_attn.q_proj": 6},
        alpha_pattern={"q_proj": 5, "layers.0.mlp.up_proj": 9, r".*\.1\..*v_proj": 2.5},
        init_lora_weights=False,
        **config,
    )
    model = peft.get_peft_model(tiny_model(), asked)
    model.save_pretrained(tmp_path)
    weights, layers = read_folder("x", str(tmp_path), 16), 0
    for name, part in model.get_base_model().named_modules():
        if hasattr(part, "lora_A"):
            layers += 1
            ours = weights.layers[name]
            delta = ours.scale * (ours.b @ ours.a)
            torch.testing.assert_close(delta, part.get_delta_weight("default"))
    assert layers == len(weights.layers) == 14 and weights.rank == 6


def test_a_digest_is_of_bits_scales_and_layers(tmp_path):
    def digest(**changes):
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        return read_folder("x", save_adapter(where, **changes), 16).digest

    same = digest()
    assert digest() == same
    others = [digest(seed=1), digest(alpha=9), digest(targets=("q_proj",)), digest(rank=5)]
    assert len({same, *others}) == 5
