"""Files kept between runs are listed and deleted, and no others are."""

from __future__ import annotations

import json

import pytest

from spectral_paged.cli.commands import main
from spectral_paged.models import kept_files
from spectral_paged.models.gguf import convert_gguf
from support.gguf_files import write_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder with one of everything: two used, two unused, and two that are somebody's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(folder))
    convert_gguf(write_gguf(tmp_path / "small.gguf"))
    (folder / "calibrations").mkdir()
    (folder / "calibrations" / "0123456789abcdef.safetensors").write_bytes(b"x" * 100)
    old = folder / "small-0123456789abcdef"
    old.mkdir()
    (old / "config.json").write_text("{}")
    (folder / f"{kept_files.SCRATCH}abc").mkdir()
    (folder / "my-model").mkdir()
    (folder / "my-model" / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def listed():
    return {file.name: (file.kind, file.is_used) for file in kept_files.kept_files()}


def test_what_is_kept_is_listed_with_its_source(cache, tmp_path, capsys):
    (used,) = [name for name, (kind, used) in listed().items() if used and kind == "conversion"]
    assert listed() == {
        used: ("conversion", True),
        "small-0123456789abcdef": ("conversion", False),
        f"{kept_files.SCRATCH}abc": ("conversion", False),
        "0123456789abcdef.safetensors": ("calibration", True),
    }
    for line in (["cache"], ["cache", "list"]):
        assert main(line) == 0
        out = capsys.readouterr().out
        assert used in out and str(tmp_path / "small.gguf") in out and out.count("not used") == 2
        assert f"4 kept in {cache}" in out and "my-model" not in out


@pytest.mark.parametrize(
    "arguments, left",
    [
        ([], 0),
        (["--unused"], 2),
        (["0123456789abcdef.safetensors"], 3),
        (["small-0123456789abcdef", "0123456789abcdef.safetensors"], 2),
    ],
)
def test_clear_deletes_what_it_names_and_nothing_of_others(cache, capsys, arguments, left):
    assert main(["cache", "clear", *arguments]) == 0
    assert f"deleted {4 - left} of 4" in capsys.readouterr().out
    assert len(kept_files.kept_files()) == left
    assert (cache / "notes.txt").exists() and (cache / "my-model" / "config.json").exists()


def test_a_name_that_is_not_kept_is_refused_and_nothing_is_deleted(cache, capsys):
    assert main(["cache", "clear", "my-model", "../cache"]) == 2
    assert "nothing named my-model, ../cache is kept" in capsys.readouterr().err
    assert len(kept_files.kept_files()) == 4


def test_what_was_cleared_is_made_again(cache, tmp_path):
    assert main(["cache", "clear"]) == 0
    assert (convert_gguf(tmp_path / "small.gguf") / "config.json").exists()


def test_a_link_is_deleted_and_not_what_it_points_at(cache, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (cache / "link-0123456789abcdef").symlink_to(target)
    assert main(["cache", "clear"]) == 0
    assert (target / "config.json").exists() and not (cache / "link-0123456789abcdef").exists()


def test_an_empty_or_missing_folder_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "none"))
    assert main(["cache"]) == 0 and main(["cache", "clear"]) == 0
    assert "0 kept in" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 1}', json.dumps({"version": "x"})])
def test_a_manifest_of_another_kind_is_a_conversion_of_another_version(cache, content):
    (folder,) = kept_files.conversions()
    (folder / kept_files.MANIFEST).write_text(content)
    assert not kept_files.is_conversion(folder) and list(kept_files.conversions()) == []
    assert listed()[folder.name] == ("conversion", False)
