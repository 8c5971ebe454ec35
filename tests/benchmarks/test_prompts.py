"""`bench prompts` times every backend that is there, and the engine, and refuses wrong results."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from spectral_paged.benchmarks.prompts import attention, in_place, run
from spectral_paged.benchmarks.prompts.in_place import StoredSequence
from spectral_paged.benchmarks.throughput.random_models import load_random
from spectral_paged.cli.commands import main
from spectral_paged.errors import InvalidRequestError
from spectral_paged.kernels.chunk import gpu
from spectral_paged.kernels.chunk.backend import ChunkKind
from spectral_paged.kernels.chunk.reference import ChunkSpans

CPU = torch.device("cpu")
GEOMETRY = load_random("random:tiny", device=torch.device("meta"), dtype=torch.float32).geometry
KIND = ChunkKind(torch.float32, GEOMETRY.head_dim, CPU)


def test_every_number_of_keys_is_timed_fresh_and_with_fewer_queries():
    found = attention.cases((2048, 8192), (2048, 8192))
    assert found == [(2048, 2048), (8192, 8192), (8192, 2048)]


@pytest.mark.parametrize("keys, queries", [(1, 1), (5, 5), (9, 2)])
def test_operations_count_what_a_query_sees(keys, queries):
    seen = sum(keys - queries + i + 1 for i in range(queries))
    assert attention.operations(keys, queries, 3, 16) == 4 * 3 * 16 * seen


def test_a_backend_with_another_result_is_not_timed(monkeypatch):
    class Wrong:
        def obstacle(self, kind):
            return None

        def attend(self, q, k, v, spans, scores, window, sinks):
            return q + 1

    monkeypatch.setattr(gpu, "BACKENDS", gpu.BACKENDS | {"wrong": Wrong()})
    monkeypatch.setattr(attention, "BACKENDS", gpu.BACKENDS)
    with pytest.raises(ArithmeticError, match="wrong differs from the fp32 twin"):
        list(attention.measure(GEOMETRY, KIND, (64,), ()))


def test_chunks_and_prompts_are_timed_written_and_shown(tmp_path, capsys):
    line = "bench prompts --model random:tiny --device cpu --dtype float32 --keys 96 --keys 64"
    line += " --queries 64 --input-len 700 --input-len 1300 --num-prompts 2"
    line += " --max-num-batched-tokens 512 --max-num-batched-tokens 2048"
    line += " --prefill-segment 512 --prefill-segment 1024"
    assert main([*line.split(), "--output-dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "prompts-random-tiny.json").read_text())
    rows = result["attention"]
    assert [(r["keys"], r["queries"]) for r in rows] == [(96, 96), (96, 64), (64, 64)]
    assert {r["backend"] for r in rows} == {"sdpa"}
    assert all(0 < r["least_ms"] <= r["ms"] <= r["most_ms"] and r["error"] < 1e-6 for r in rows)
    assert [r["keys"] for r in result["copies"]] == [96, 64]
    assert all(r["ms"] > 0 and r["gigabytes_per_second"] > 0 for r in result["copies"])
    assert set(result["not_here"]) == {"fa3", "xformers", "varlen", "cudnn"}
    assert result["heads"] == [4, 2, 64] and result["environment"]["torch"]
    whole = result["engine"]
    assert [(r["format"], r["segment"], r["budget"], r["input_len"]) for r in whole] == [
        (format, segment, budget, length)
        for format, segments in (("exact", (0,)), ("spectral-quality", (512, 1024)))
        for segment in segments
        for budget in (512, 2048)
        for length in (700, 1300)
    ]
    assert all(
        r["tokens_per_second"] * r["seconds"] == pytest.approx(2 * r["input_len"]) for r in whole
    )
    assert [r["seal_seconds"] > 0 for r in whole] == [False] * 4 + [True] * 8
    shown = capsys.readouterr().out
    assert "sdpa ms (TFLOP/s)" in shown and "2 x 1,300" in shown
    assert shown.rstrip().splitlines()[-1].split()[:5] == [
        "spectral-quality",
        "1,024",
        "2",
        "x",
        "1,300",
    ]


def test_chunks_alone_need_no_engine(tmp_path):
    line = "bench prompts --model random:tiny --device cpu --dtype float32 --keys 64 --name x"
    assert main([*line.split(), "--attention-only", "--output-dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "prompts-x.json").read_text())
    assert result["attention"] and not result["engine"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, dim", [(1, 64), (3, 16), (8, 128), (2, 96)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_page_is_found_by_its_unit_in_the_views(dtype, heads, dim, length):
    """Views over any unit overlap; a table of units reads a sequence's pages through them."""
    k, v = torch.randn(2, heads, length, dim).to(dtype)
    stored = StoredSequence.of(k, v)
    for view, want in zip(stored.views(), (k, v)):
        assert view.data_ptr() % 16 == 0 and view.stride(-1) == 1
        assert all(step * dtype.itemsize % 16 == 0 for step in view.stride()[:-1])
        end = view.storage_offset() + sum((n - 1) * s for n, s in zip(view.shape, view.stride()))
        assert end < stored.plane.numel() // dtype.itemsize  # nothing outside can be read
        read = view[stored.places.units.long()].flatten(0, 1)[:length]
        assert torch.equal(read.transpose(0, 1), want)
    assert torch.equal(stored.copied(), torch.stack((k, v)))


def test_vllms_kernel_is_asked_to_read_rows_or_pages_by_their_units(monkeypatch):
    calls = []

    def flash_attn_varlen_func(q, k, v, **options):
        calls.append((k.shape, v.storage_offset() - k.storage_offset(), options))
        return q

    fake = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", fake)
    k, v = torch.randn(2, 2, 150, 64).bfloat16()
    stored = StoredSequence.of(k, v)
    q = torch.zeros(7, 4, 64).bfloat16()
    spans = ChunkSpans.of([7], [150], q.device)
    assert in_place.of_pages(q, stored, spans, 0.5) is q
    assert in_place.of_rows(q, k, v, spans, 0.5) is q
    (shape, apart, options), (rows, _, others) = calls
    assert rows == (150, 2, 64) and others.pop("cu_seqlens_k").tolist() == [0, 150]
    assert others.pop("cu_seqlens_q").tolist() == [0, 7]
    assert shape[1:] == (64, 2, 64) and apart == 64 * 64
    table = options.pop("block_table")
    assert table.dtype == torch.int32 and table.tolist() == [stored.places.units.tolist()]
    assert options.pop("cu_seqlens_q").tolist() == [0, 7]
    assert options.pop("seqused_k").tolist() == [150]
    assert (
        others
        == options
        == {
            "max_seqlen_q": 7,
            "max_seqlen_k": 150,
            "softmax_scale": 0.5,
            "causal": True,
            "num_splits": 1,
            "fa_version": 3,
        }
    )


def test_a_format_that_does_not_exist_is_refused_before_work(tmp_path):
    with pytest.raises(InvalidRequestError, match="spectral-fast: use "):
        run.main(
            model="random:tiny",
            device="cpu",
            dtype="float32",
            keys=(64,),
            queries=(),
            formats=("spectral-fast",),
            segments=(2048,),
            input_lens=(64,),
            budgets=(64,),
            num_prompts=1,
            attention_only=False,
            enforce_eager=True,
            name="",
            output_dir=tmp_path,
        )
    assert not list(tmp_path.iterdir())
