"""`spectral-paged bench`: subcommands pass their arguments on, write results and refuse misuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectral_paged.cli.commands import main
from spectral_paged.errors import MissingPackageError
from spectral_paged.models.loader import resolve


@pytest.mark.model
def test_bench_quality_writes_results_and_pictures(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Chapter {i} tells of the {i}th day at sea." for i in range(300)))
    model = tmp_path / "SmolLM2-0.1B"  # a dot in a name is no suffix
    model.symlink_to(resolve("smollm2-135m"))
    code = main(
        [
            "bench",
            "quality",
            "--model",
            str(model),
            "--text",
            str(text),
            "--no-peers",
            "--format",
            "spectral-int8",
            "--sections",
            "reconstruction",
            "--length",
            "1024",
            "--journal",
            str(tmp_path / "journal.jsonl"),
            "--output-dir",
            str(tmp_path),
        ]
    )
    assert code == 0
    result = json.loads((tmp_path / "quality-SmolLM2-0.1B.json").read_text())
    assert len(result["spectra"]["k_pre"]) == 30 and result["environment"]["torch"]
    errors = result["reconstruction"]["spectral-int8"]
    assert all(0 < x < 0.9 for key in "kv" for x in errors[key])
    assert all(len(heads) == 9 for heads in errors["attention"])
    report = (tmp_path / "quality-SmolLM2-0.1B.md").read_text()
    assert "## Singular values of K and V" in report
    pictures = list(tmp_path.glob("quality-SmolLM2-0.1B-*.png"))
    assert len(pictures) == 3
    assert all(p.name in capsys.readouterr().out for p in pictures[:1])


def test_bench_quality_hands_its_options_over(monkeypatch):
    from spectral_paged.benchmarks.quality import run

    asked = []
    monkeypatch.setattr(run, "main", lambda options: asked.append(options) or 0)
    monkeypatch.setattr(run, "plot", lambda files, folder: asked.append((files, folder)) or 0)
    line = "bench quality --format exact --format spectral-int8 --length 4096 --length 2048"
    line += " --sections needles,ranks --no-peers --windows 3 --time-limit 60"
    line += " --variant spectral-page --samples 2"
    assert main(line.split()) == main(["bench", "quality"]) == 0
    assert asked[0] == run.Options(
        formats=["exact", "spectral-int8"],
        lengths=[2048, 4096],
        sections=["needles", "ranks"],
        variants=["spectral-page"],
        samples=2,
        texts=[],
        peers=False,
        windows=3,
        time_limit=60,
    )
    assert asked[1].model == "smollm2-135m" and not asked[1].quick
    assert main(["bench", "quality", "--plot", "a.json", "b.json", "--output-dir", "out"]) == 0
    assert asked[2] == ([Path("a.json"), Path("b.json")], Path("out"))


def unsloth_bench(monkeypatch, line):
    """Exit code of `bench unsloth`, and what would run apart."""
    from spectral_paged.benchmarks.unsloth import run as unsloth

    asked = []
    monkeypatch.setattr("spectral_paged.device.choose_device", torch.device)
    monkeypatch.setattr(unsloth, "run_apart", lambda *args: asked.append(args) or 0)
    return main(["bench", "unsloth", *line.split()]), asked


def test_bench_unsloth_hands_its_options_over(monkeypatch):
    line = "--needles 9 --length 4096 --dtype float32 --format exact --enforce-eager"
    code, ((module, arguments),) = unsloth_bench(monkeypatch, line)
    assert code == 0 and module == "spectral_paged.benchmarks.unsloth.needles"
    assert arguments == {
        "model": "smollm2-135m",
        "formats": ["exact"],
        "count": 9,
        "lengths": [4096],
        "dtype": "float32",
        "enforce_eager": True,
        "output_dir": Path("benchmarks/results"),
    }
    code, ((module, arguments),) = unsloth_bench(monkeypatch, "--output-dir out")
    assert code == 0 and module == "spectral_paged.benchmarks.unsloth.run"
    assert arguments == {
        "model": "random:mistral-7b",
        "formats": [],
        "enforce_eager": False,
        "output_dir": Path("out"),
    }


def test_options_of_needles_are_refused_without_needles(monkeypatch, capsys):
    for line in ("--length 512", "--dtype float32"):
        assert unsloth_bench(monkeypatch, line) == (2, [])
        assert "are of --needles" in capsys.readouterr().err


def test_what_unsloth_s_process_refuses_is_told_in_a_line(monkeypatch, tmp_path, capfd):
    from spectral_paged.benchmarks.unsloth import run as unsloth

    arguments = {
        "model": "none.gguf",
        "formats": ["exact"],
        "count": 1,
        "lengths": [512],
        "dtype": "auto",
        "output_dir": tmp_path,
    }
    module = "spectral_paged.benchmarks.unsloth.needles"
    (tmp_path / "unsloth.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert unsloth.run_apart(module, arguments) == 2
    assert capfd.readouterr().err == "spectral-paged: there is no file 'none.gguf'\n"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[unsloth\]'"):
        unsloth.run_apart(module, arguments)
