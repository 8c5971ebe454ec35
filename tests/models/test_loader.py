"""Models load from GGUF files, folders and names, and each refusal names a remedy."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from spectral_paged import LLM, SamplingParams
from spectral_paged.errors import (
    CorruptFileError,
    MissingPackageError,
    UnknownModelError,
    UnsupportedModelError,
)
from spectral_paged.models import kept_files, loader
from spectral_paged.models.gguf import conversion
from support.gguf_files import write_gguf
from support.tiny_model import tiny_model


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A conversion folder of this test's own, and no network."""
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_gguf_file_generates_and_its_conversion_is_made_once(tmp_path, own_cache, monkeypatch):
    path = str(write_gguf(tmp_path / "small.gguf"))
    params = SamplingParams(temperature=0.0, max_tokens=5)
    on_cpu = {"kv_format": "exact", "device": "cpu"}
    first = LLM(path, **on_cpu).generate("hello there", params, use_tqdm=False)
    assert first[0].prompt_token_ids[:2] == [256, 257]  # he, ll
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf")
    ids = torch.tensor([first[0].prompt_token_ids])
    want = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert first[0].outputs[0].token_ids == want[0, ids.shape[1] :].tolist()
    (folder,) = own_cache.iterdir()
    written = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    monkeypatch.setattr(conversion, "GGUFFile", lambda path: pytest.fail("read a second time"))
    again = LLM(path, **on_cpu).generate("hello there", params, use_tqdm=False)
    assert again[0].outputs[0].text == first[0].outputs[0].text
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == written
    assert list(own_cache.iterdir()) == [folder], "no scratch folder is left"


def test_a_damaged_conversion_is_refused_with_its_folder(tmp_path, own_cache):
    path = str(write_gguf(tmp_path / "small.gguf"))
    folder = Path(loader.resolve(path))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match=f"delete {folder}, and they are made again"):
        LLM(path, device="cpu")
    shutil.rmtree(folder)
    LLM(path, device="cpu", kv_format="exact")


def test_a_gguf_file_that_changed_is_converted_again(tmp_path, own_cache):
    path = write_gguf(tmp_path / "small.gguf")
    before = loader.resolve(str(path))
    torch.manual_seed(1)
    write_gguf(path, seed=1)
    assert loader.resolve(str(path)) != before


def test_a_conversion_is_known_by_the_files_content(tmp_path, own_cache):
    """Neither name nor size nor time says what is in a file."""
    first, second = write_gguf(tmp_path / "a.gguf"), write_gguf(tmp_path / "b.gguf", seed=1)
    os.utime(first, ns=(1, 1))
    before = loader.resolve(str(first))
    os.replace(second, first)
    os.utime(first, ns=(1, 1))
    after = loader.resolve(str(first))
    assert after != before and len(list(own_cache.iterdir())) == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert loader.resolve(str(shutil.copy(first, elsewhere / "a.gguf"))) == after


def test_conversions_of_earlier_versions_are_not_read(tmp_path, own_cache, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf")
    stat = path.stat()
    content = f"{path}/{stat.st_size}/{stat.st_mtime_ns}"  # as they were named once
    old = own_cache / f"a-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    first = loader.resolve(str(path))
    assert Path(first) != old
    monkeypatch.setattr(conversion, "CONVERTER_VERSION", conversion.CONVERTER_VERSION + 1)
    monkeypatch.setattr(kept_files, "CONVERTER_VERSION", kept_files.CONVERTER_VERSION + 1)
    assert loader.resolve(str(path)) != first


def test_a_conversion_that_was_not_finished_is_made_again(tmp_path, own_cache, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf")
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "write_weights", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loader.resolve(str(path))
    assert list(own_cache.iterdir()) == []
    assert (Path(loader.resolve(str(path))) / "config.json").exists()


@pytest.mark.parametrize("keep", [0, 3, 23, 24, 100, 2000, 0.5, 0.99, -1])
def test_a_truncated_gguf_is_refused_and_leaves_nothing(tmp_path, own_cache, keep):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    size = int(len(whole) * keep) if isinstance(keep, float) else keep
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:size])
    with pytest.raises(CorruptFileError, match=r"cut\.gguf.*fetch it again"):
        LLM(str(cut))
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_what_is_no_gguf_or_another_version_is_refused_with_a_remedy(tmp_path, own_cache):
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CorruptFileError, match="not a GGUF file.*fetch it again"):
        LLM(str(path))
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(40))
    with pytest.raises(CorruptFileError, match="version 9; versions 2 and 3 are read: convert"):
        LLM(str(path))
    with pytest.raises(UnsupportedModelError, match="take a GGUF file of a family"):
        LLM(str(write_gguf(path, arch="rwkv6")))


FOLDERS = {
    "no config": (None, UnknownModelError, "no config.json"),
    "half a config": ('{"model_type": "llama"', CorruptFileError, "fetch it again"),
    "a config of a wrong type": (
        '{"model_type": "llama", "hidden_size": "x"}',
        CorruptFileError,
        "hidden_size.*fetch it again",
    ),
    "an unknown family": ('{"model_type": "nobody"}', UnsupportedModelError, "nobody.*take a"),
    "no weights": (
        '{"model_type": "llama", "num_hidden_layers": 1}',
        CorruptFileError,
        "safetensors.*fetch them again",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_holds_no_model_is_refused_with_a_remedy(tmp_path, own_cache, case):
    config, error, message = FOLDERS[case]
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=message):
        LLM(str(tmp_path))


def test_a_package_that_a_model_needs_is_named(tmp_path, own_cache, monkeypatch):
    tiny_model().save_pretrained(tmp_path)

    def missing(*args, **options):
        raise ImportError("this model needs einops")

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(MissingPackageError, match="not installed: this model needs einops"):
        LLM(str(tmp_path))


def test_a_model_without_a_tokenizer_is_refused_with_a_remedy(tmp_path, own_cache):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(CorruptFileError, match="has no tokenizer that can be loaded.*from_model"):
        LLM(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["smollm3-135m", "nobody/such-model", "gone/model.gguf"])
def test_an_unknown_name_is_refused_by_name(own_cache, name):
    with pytest.raises(UnknownModelError, match=name):
        LLM(name)
