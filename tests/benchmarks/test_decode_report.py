"""The report of `bench decode` shows no speed without a KL, and nothing that was not measured."""

from __future__ import annotations

import json

import pytest

from spectral_paged.benchmarks.decode import report as decode_report, run as decode
from spectral_paged.cli.commands import main as cli
from spectral_paged.errors import CorruptFileError
from spectral_paged.pages import PageFormat


def row(what, part="pages", **changes):
    base = {
        "shape": "llama-3-8b",
        "work": "8 x 8192",
        "what": what,
        "part": part,
        "ms": 0.5,
        "gigabytes_per_second": 1000.0,
        "copy_share": 0.3,
        "speedup": 2.0,
        "error": None,
        "fingerprint": "",
        "kl": None,
    }
    return {**base, **changes}


def result(*rows):
    env = {"date": "2026-01-01", "commit": "abc", "torch": "2"}
    return {"gpu": "a GPU", "environment": env, "copy_bytes_per_second": 1.0, "rows": list(rows)}


def quality(folder, name="spectral-quality", dim=128, **changes):
    """A result of `bench quality` for one preset of one KV head, with fields changed."""
    format = PageFormat.preset(name, num_kv_heads=1, head_dim=dim)
    fields = {k: getattr(format, k) for k in format.__dataclass_fields__}
    value = {
        "formats": {name: {**fields, "basis_id": "0123456789abcdef", **changes}},
        "overall": {"methods": {name: {"kl": 0.25}}},
    }
    (folder / "quality-some-model.json").write_text(json.dumps(value))


def preset_row(name="spectral-quality"):
    format = PageFormat.preset(name, num_kv_heads=8, head_dim=128)
    return row(f"{name} (gluon)", error=1e-5, fingerprint=format.fingerprint)


def test_a_format_has_the_kl_of_the_same_fields_whatever_its_heads_and_calibration(tmp_path):
    quality(tmp_path)
    format = PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128)
    assert decode.judged(format, tmp_path) == {"some-model": 0.25}


@pytest.mark.parametrize("changes", [{"rope": "pre"}, {"outlier_slots": 2}, {"head_dim": 64}])
def test_a_format_with_one_field_changed_was_not_judged(tmp_path, changes):
    quality(tmp_path, **changes)
    format = PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128)
    assert decode.judged(format, tmp_path) == {}


def test_a_format_that_was_not_judged_has_no_row_in_the_report(tmp_path):
    text = decode_report.markdown(
        decode.with_quality(result(row("exact_decode bf16"), preset_row()), tmp_path)
    )
    assert "exact_decode bf16" in text and "spectral-quality" not in text
    quality(tmp_path)
    text = decode_report.markdown(
        decode.with_quality(result(row("exact_decode bf16"), preset_row()), tmp_path)
    )
    assert "| spectral-quality (gluon) |" in text and "some-model 0.2500" in text


def test_a_row_of_other_bytes_than_the_preset_has_today_is_left_out(tmp_path):
    quality(tmp_path)
    old = preset_row() | {"fingerprint": "of another time"}
    assert "spectral-quality" not in decode_report.markdown(
        decode.with_quality(result(row("bf16"), old), tmp_path)
    )


def test_the_report_is_written_anew_from_an_earlier_result(tmp_path, capsys):
    quality(tmp_path)
    rows = [row("bf16"), preset_row(), preset_row() | {"part": "attend"}]
    (tmp_path / "decode.json").write_text(json.dumps(result(*rows)))
    argv = ["bench", "decode", "--report-only", "--output-dir", str(tmp_path)]
    assert cli([*argv, "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("decode.md", "decode-bandwidth.png", "decode-kl.png"):
        assert (tmp_path / name).stat().st_size > 0 and name in printed


@pytest.mark.parametrize("content", [None, "{", "{}", '{"rows": []}'])
def test_a_damaged_result_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "decode.json").write_text(content)
    with pytest.raises(CorruptFileError, match="measure first"):
        decode_report.read(tmp_path / "decode.json")
