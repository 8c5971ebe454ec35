"""Files survive processes killed while they write; files cut or altered are refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_paged import LLM
from spectral_paged.batch.file import OutputFile
from spectral_paged.errors import (
    CorruptFileError,
    FormatError,
    InvalidRequestError,
)
from spectral_paged.models.calibration import model_fingerprint
from support.page_parts import toy_basis
from support.tiny_model import tiny_model

# ---- JSONL -------------------------------------------------------------------------------


def test_an_output_cut_at_any_byte_is_resumed(tmp_path):
    whole = tmp_path / "whole.jsonl"
    file = OutputFile(whole)
    for i, text in enumerate(("one", "zwölf", "\n"), start=1):
        file.write({"line": i, "line_hash": str(i), "text": text})
    file.close()
    data, cut = whole.read_bytes(), tmp_path / "cut.jsonl"
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        file = OutputFile(cut)
        kept = data[:size].count(b"\n")
        assert sorted(file.finished) == list(range(1, kept + 1))
        for i in range(kept + 1, 4):
            file.write(json.loads(data.splitlines()[i - 1]))
        file.close()
        assert cut.read_bytes() == data


WRITER = """
import sys
from pathlib import Path
from spectral_paged.batch.file import OutputFile
file = OutputFile(Path(sys.argv[1]))
print("ready", flush=True)
line = max(file.finished, default=0)
while True:
    line += 1
    file.write({"line": line, "line_hash": "x" * 5000})
"""


def test_a_writer_killed_at_any_moment_leaves_whole_records(tmp_path):
    out = tmp_path / "out.jsonl"
    finished = 0
    for pause in (0.0, 0.02):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(out)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while out.stat().st_size < 6000 * (finished + 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        file = OutputFile(out)
        file.close()
        assert sorted(file.finished) == list(range(1, len(file.finished) + 1))
        assert len(file.finished) > finished
        finished = len(file.finished)


def test_two_runs_never_write_to_one_output(tmp_path):
    """The second would cut what the first is writing, and serve its lines again."""
    out = tmp_path / "out.jsonl"
    first = OutputFile(out)
    first.write({"line": 1, "line_hash": "x"})
    for overwrite in (False, True):
        with pytest.raises(InvalidRequestError, match="writes to"):
            OutputFile(out, overwrite=overwrite)
    first.close()
    again = OutputFile(out)
    assert again.finished == {1: "x"}
    again.close()


# ---- files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of width 32, its calibration, and the folder that both lie in."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(head_dim=32)
    model.save_pretrained(folder)
    basis = toy_basis(2, 2, 32, model=model_fingerprint(model))
    basis.save(folder / "spectral_basis.safetensors")
    return folder


@pytest.mark.parametrize("cut", [0, 7, 200, 0.5, -1, "bit"])
def test_an_llm_refuses_a_damaged_calibration_by_name(saved, tmp_path, cut):
    data = bytearray((saved / "spectral_basis.safetensors").read_bytes())
    if cut == "bit":
        data[-1001] ^= 4
    else:
        del data[int(len(data) * cut) if isinstance(cut, float) else cut :]
    path = tmp_path / "spectral_basis.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"spectral_basis\.safetensors.*calibrate"):
        LLM.from_model(tiny_model(head_dim=32), kv_cache_bytes=8 << 20, calibration=path)


def test_a_model_that_was_altered_refuses_the_calibration_of_the_one_before(saved):
    model = tiny_model(head_dim=32)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    path = saved / "spectral_basis.safetensors"
    with pytest.raises(FormatError, match="was calibrated on a model with fingerprint"):
        LLM.from_model(model, kv_cache_bytes=8 << 20, calibration=path)


@pytest.mark.parametrize("how", [0, 7, 300, 0.5, -1, "header", "missing", "shape"])
def test_a_damaged_model_file_is_refused_by_name(saved, tmp_path, how):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    source, path = saved / "model.safetensors", tmp_path / "model.safetensors"
    data = bytearray(source.read_bytes())
    if how in ("missing", "shape"):
        tensors = load_file(source)
        name = "model.layers.1.self_attn.v_proj.weight"
        if how == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:8].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        if how == "header":
            data[20] ^= 0xFF
        else:
            del data[int(len(data) * how) if isinstance(how, float) else how :]
        path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=f"{tmp_path}.*cannot be loaded"):
        LLM(str(tmp_path), device="cpu")
