"""Loading runs no pickle or model code and reads no file outside or too large; audits are loud."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer

from spectral_paged import LLM, file_limits
from spectral_paged.batch import file as batch_file
from spectral_paged.batch.file import OutputFile, count_lines, read_lines
from spectral_paged.cli.commands import main
from spectral_paged.errors import CorruptFileError, UnknownModelError, UnsupportedModelError
from spectral_paged.file_limits import bounded_lines, check_file, is_cut
from spectral_paged.models import checkpoint_files, loader
from spectral_paged.pages import SharedBasis, shared_basis
from support.paths import ROOT
from support.tiny_model import tiny_format, tiny_llm, tiny_model

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


class Tripwire:
    """Unpickling one leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole sharded model without a tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy of it that a test may spoil; the tokenizer is left out."""
    monkeypatch.setattr(loader.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(where):
    return loader.load_model(str(where), **CPU)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickled_checkpoint_is_refused_unread(folder, tmp_path, name):
    for path in folder.glob("*safetensors*"):
        path.unlink()
    torch.save(Tripwire(tmp_path / "ran"), folder / name)
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*safetensors and GGUF only"):
        load(folder)
    with pytest.raises(UnsupportedModelError, match=rf"{name} is a pickle.*save_pretrained"):
        load(folder / name)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_no_matter(folder, tmp_path):
    torch.save(Tripwire(tmp_path / "ran"), folder / "training_args.bin")
    assert load(folder).geometry.num_layers == 2
    assert not (tmp_path / "ran").exists()


def test_a_weights_file_alone_is_refused_with_a_remedy(folder):
    path = next(folder.glob("*.safetensors"))
    with pytest.raises(UnsupportedModelError, match="name its folder"):
        load(path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("../outside.safetensors", "outside the model's folder"),
        ("a/../../outside.safetensors", "outside the model's folder"),
        ("/outside.safetensors", "outside the model's folder"),
        ("..\\outside.safetensors", "outside the model's folder"),
        ("C:/outside.safetensors", "outside the model's folder"),
        (7, "outside the model's folder"),
        ("weights.bin", "safetensors only"),
    ],
)
def test_an_index_names_safetensors_files_of_the_model_only(folder, name, message):
    shard = next(folder.glob("*.safetensors"))
    shutil.copy(shard, folder.parent / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=index | {next(iter(index)): name})
    with pytest.raises(CorruptFileError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}", "[" * 100_000])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError, match="no safetensors index.*fetch it again"):
        load(folder)


@pytest.mark.parametrize(
    "name, message",
    [
        ("adapter_model.bin", "safetensors only"),  # transformers would unpickle this one
        ("../model.safetensors", "outside the model's folder"),
    ],
)
def test_a_config_may_not_name_other_weights(folder, name, message):
    torch.save({}, folder / "adapter_model.bin")
    edit(folder / "config.json", transformers_weights=name)
    with pytest.raises(CorruptFileError, match=message):
        load(folder)


def test_an_adapter_is_refused_instead_of_left_out(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="adapter.*merge it"):
        load(folder)


def test_links_of_the_users_own_are_followed(folder, tmp_path):
    """The hub's cache is made of links too: every file points at a blob elsewhere."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    assert load(blobs / ".." / "model").geometry.num_layers == 2


def test_a_hub_id_is_checked_as_a_folder_is(folder, tmp_path, monkeypatch):
    """What lies in the hub's cache is found by id, and its index is read before its weights."""
    home = tmp_path / "hub"
    snapshot = home / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (home / "models--some--model" / "refs").mkdir()
    (home / "models--some--model" / "refs" / "main").write_text("abc")
    found = checkpoint_files.cached_file
    monkeypatch.setattr(checkpoint_files, "cached_file", lambda *a: found(*a, cache_dir=str(home)))
    config = loader.load_config(str(folder))
    checkpoint_files.check_checkpoint("some/model", config)
    path = snapshot / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=index | {next(iter(index)): "../../x.safetensors"})
    with pytest.raises(CorruptFileError, match="outside the model's folder"):
        checkpoint_files.check_checkpoint("some/model", config)
    path.unlink()
    with pytest.raises(CorruptFileError, match="no model.safetensors and no index"):
        checkpoint_files.check_checkpoint("some/model", config)


# ---- code --------------------------------------------------------------------------------


def own_code(folder, mark):
    """Let the config bring a module that leaves a mark when it runs."""
    edit(
        folder / "config.json",
        model_type="own-llama",
        auto_map={"AutoConfig": "own.OwnConfig"},
    )
    (folder / "own.py").write_text(
        "import os\nfrom transformers import LlamaConfig\n"
        f"os.makedirs({str(mark)!r}, exist_ok=True)\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'llama'\n"
    )


def test_a_models_own_code_runs_only_where_it_is_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    mark = tmp_path / "ran"
    own_code(folder, mark)
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        LLM(str(folder), device="cpu")
    assert not mark.exists()
    loader.load_config(str(folder), trust_remote_code=True)
    assert mark.exists()


@pytest.mark.parametrize("asked", [False, True])
def test_the_option_reaches_every_loader(folder, monkeypatch, asked):
    seen = []

    def spy(owner):
        real = owner.from_pretrained

        def from_pretrained(*args, **kwargs):
            seen.append(kwargs["trust_remote_code"])
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, "from_pretrained", from_pretrained)

    for owner in (loader.AutoConfig, loader.AutoModelForCausalLM, AutoTokenizer):
        spy(owner)
    LLM(str(folder), device="cpu", kv_format="exact", trust_remote_code=asked)
    assert seen[0] is asked and len(seen) >= 3 and set(seen[-2:]) == {asked}


# ---- sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(checkpoint_files.SIZES))
def test_a_models_small_files_are_small(folder, monkeypatch, name):
    monkeypatch.setitem(checkpoint_files.SIZES, name, 10_000)
    path = folder / name
    path.write_text((path.read_text() if path.exists() else "{}") + " " * 20_000)
    with pytest.raises(CorruptFileError, match=rf"{name} has .*at most 10000 bytes"):
        load(folder)


def test_limits_are_above_what_the_largest_models_have():
    heads, dim, layers = 8, 128, 126
    assert 7 * layers * heads * dim * dim * 4 * 10 < file_limits.MAX_CALIBRATION_BYTES
    million_ids = 1_000_000 * len("123456, ")
    assert 5 * million_ids < file_limits.MAX_LINE_BYTES
    assert file_limits.MAX_RECORD_BYTES > file_limits.MAX_LINE_BYTES


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(CorruptFileError, match="no regular file"):
        check_file(tmp_path, 10, "a test")
    with pytest.raises(CorruptFileError, match="no regular file"):
        check_file(Path("/dev/zero"), 10, "a test")
    path = tmp_path / "eleven"
    path.write_bytes(bytes(11))
    check_file(path, 11, "a test")
    with pytest.raises(CorruptFileError, match="eleven has 11 bytes; a test has at most 10 bytes"):
        check_file(path, 10, "a test")


def test_a_calibration_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_basis, "MAX_CALIBRATION_BYTES", 100)
    monkeypatch.setattr(shared_basis, "safe_open", lambda *a, **k: pytest.fail("read"))
    path = tmp_path / "basis.safetensors"
    path.write_bytes(bytes(101))
    with pytest.raises(CorruptFileError, match="at most 100 bytes.*make it again"):
        SharedBasis.load(path)
    with pytest.raises(CorruptFileError, match="make it again"):
        SharedBasis.load(tmp_path / "none")


def test_calibration_text_that_is_too_large_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("spectral_paged.cli.commands.MAX_TEXT_BYTES", 10)
    path = tmp_path / "text.txt"
    path.write_text("a" * 11)
    assert main(["calibrate", "smollm2-135m", "--data", str(path)]) == 2
    assert "text.txt has 11 bytes; calibration text has at most 10" in capsys.readouterr().err


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_are_told_apart_whatever_is_cut(size, end):
    data = b"ab\n" + b"x" * size + b"\n\n" + b"y" * size + end
    found = list(bounded_lines(io.BytesIO(data), 4))
    whole = data.splitlines(keepends=True)
    assert [number for number, _ in found] == [1, 2, 3, 4]
    for (_, raw), line in zip(found, whole, strict=True):
        assert raw == line[:5]
        assert is_cut(raw, 4) == (len(line.rstrip(b"\n")) > 4)


def test_a_line_that_is_too_long_is_an_error_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 30)
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "' + " " * 40 + '"}\n{"prompt": "b"}\n')
    lines = list(read_lines(path, {}))
    assert [line.prompt for line in lines] == ["a", None, "b"]
    assert [line.number for line in lines] == [1, 2, 3] and count_lines(path) == 3
    assert "more than 30 bytes: is the file JSONL" in str(lines[1].error)


def test_a_record_that_is_too_long_drops_nothing(tmp_path, monkeypatch):
    """Cut, it looks like the torn end that a kill leaves, which is dropped with all behind it."""
    path = tmp_path / "out.jsonl"
    record = b'{"line": 1, "line_hash": "h", "text": "' + b"a" * 50 + b'"}\n'
    path.write_bytes(record * 2)
    monkeypatch.setattr(batch_file, "MAX_RECORD_BYTES", 60)
    with pytest.raises(CorruptFileError, match="line 1: more than 60 bytes"):
        OutputFile(path)
    assert path.read_bytes() == record * 2


def test_a_wrong_name_is_still_an_unknown_model():
    with pytest.raises(UnknownModelError, match="nobody/here"):
        load("nobody/here")


def test_a_model_in_memory_needs_no_files():
    assert tiny_llm(tiny_format("exact")).model_name == "LlamaForCausalLM"


# ---- dependencies ------------------------------------------------------------------------

AUDITS = {  # what the stand-in for pip-audit does -> (exit status, what is said)
    "echo '{}' > $OUT; exit 0": (0, "no known vulnerability"),
    "echo '{}' > $OUT; echo 'torch 1.0 PYSEC-1'; exit 1": (1, "PYSEC-1"),
    "echo 'cannot connect' >&2; exit 1": (2, "NOT RUN"),
    "exit 0": (2, "NOT RUN"),
}


@pytest.mark.parametrize("does", AUDITS)
def test_an_audit_that_did_not_run_never_passes(tmp_path, does):
    status, said = AUDITS[does]
    tool = tmp_path / "pip-audit"
    find = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && OUT="$2"; shift; done\n'
    tool.write_text(f"#!/usr/bin/env bash\n{find}{does}\n")
    tool.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "audit"), str(tool)], capture_output=True, text=True
    )
    assert done.returncode == status and said in done.stdout + done.stderr
    assert (done.returncode == 0) == ("no known vulnerability" in done.stdout)


def test_without_the_tool_an_audit_says_that_it_did_not_run(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "audit"), str(tmp_path / "none")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "NOT RUN" in done.stderr


def test_the_audit_is_no_part_of_the_tests():
    makefile = (ROOT / "Makefile").read_text()
    assert "\naudit:" in makefile and "audit" not in makefile.split("\ntest:")[1].split("\n\n")[0]


# ---- what is installed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, code, said",
    [
        (["a.whl 1", "b.whl 2"], 0, "all 2 archives"),
        (["a.whl 1", "b.whl 3"], 1, "b.whl has another hash"),
        (["a.whl 1"], 2, "NOT CHECKED for b.whl"),
        (["a.whl 4"], 1, "a.whl has another hash"),
        ([], 2, "NOT CHECKED for a.whl, b.whl"),
    ],
)
def test_an_archive_with_another_hash_than_its_pin_stops_the_set_up(
    tmp_path, monkeypatch, capsys, lines, code, said
):
    path = ROOT / ".ci" / "pins"
    pins = module_from_spec(spec_from_loader("pins", SourceFileLoader("pins", str(path))))
    pins.__loader__.exec_module(pins)
    file = tmp_path / "pins.sha256"
    file.write_text("".join("{1}  {0}\n".format(*line.split()) for line in lines))
    monkeypatch.setattr(pins, "PINS", file)
    monkeypatch.setattr(pins, "resolved", lambda: {"a.whl": "1", "b.whl": "2"})
    monkeypatch.setattr(pins.sys, "argv", ["pins", "check"])
    assert pins.main() == code
    out, err = capsys.readouterr()
    assert said in out + err


def test_the_list_of_pins_has_every_pinned_version():
    root = ROOT
    listed = (root / "pins.sha256").read_text().lower().replace("-", "_")
    for line in (root / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.split(";")[0].split("==")
            name = name.strip().lower().replace("-", "_").replace(".", "_")
            assert f"  {name}_{version.strip()}" in listed.replace("huggingface.", ""), line
