"""`bench throughput --plot`: what a backend gains over others, from stored results."""

from __future__ import annotations

import json

import pytest

from spectral_paged.benchmarks.throughput.plots import draw_gains, gains
from spectral_paged.cli import main
from spectral_paged.errors import InvalidRequestError
from support.paths import ROOT


def row(backend, length, output, decode, batch=256):
    return {
        "backend": backend,
        "input_len": length,
        "max_num_seqs": batch,
        "output_tokens_per_second": output,
        "decode_tokens_per_second": decode,
    }


def result(*rows):
    return {"model": "m", "environment": {"machine": "a card"}, "rows": list(rows)}


def test_a_gain_is_the_ratio_of_rows_of_one_result_sorted_by_prompt():
    long = result(row("pages", 8192, 300.0, 900.0), row("bf16", 8192, 200.0, 300.0))
    short = result(row("bf16", 1024, 50.0, None), row("pages", 1024, 25.0, 9.0))
    assert gains([long, short], "pages") == {
        ("bf16", "output_tokens_per_second"): [(1024, 0.5), (8192, 1.5)],
        ("bf16", "decode_tokens_per_second"): [(8192, 3.0)],
    }


def test_rows_of_another_result_length_or_batch_are_not_compared():
    apart = [result(row("pages", 1024, 9.0, 9.0)), result(row("bf16", 1024, 3.0, 3.0))]
    unlike = result(
        row("pages", 1024, 9.0, 9.0), row("bf16", 2048, 3.0, 3.0), row("bf16", 1024, 3.0, 3.0, 64)
    )
    assert gains([*apart, unlike], "pages") == {}


def test_the_stored_results_beside_vllm_make_a_picture(tmp_path, capsys):
    stored = sorted((ROOT / "benchmarks/results").glob("throughput-8b-vllm-*.json"))
    arguments = ["bench", "throughput", "--backend", "vllm-pages:spectral-quality"]
    assert (
        main([*arguments, "--output-dir", str(tmp_path / "new"), "--plot", *map(str, stored)]) == 0
    )
    picture = tmp_path / "new/gains.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out


@pytest.mark.parametrize("backends", [[], ["a", "b"]])
def test_one_backend_is_compared(backends, tmp_path):
    with pytest.raises(InvalidRequestError, match="--plot compares one --backend"):
        draw_gains([], backends, tmp_path / "x.png")


def test_a_backend_that_no_result_has_is_told_with_those_that_there_are(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result(row("bf16", 1024, 3.0, 3.0))))
    with pytest.raises(InvalidRequestError, match="there are: bf16"):
        draw_gains([path], ["pages"], tmp_path / "x.png")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}'])
def test_a_file_that_is_no_result_is_named(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match="r.json is no result"):
        draw_gains([path], ["pages"], tmp_path / "x.png")
    with pytest.raises(InvalidRequestError, match="gone.json is no result"):
        draw_gains([tmp_path / "gone.json"], ["pages"], tmp_path / "x.png")
