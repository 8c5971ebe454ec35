"""`bench steps` reads traces, counts the bytes of weights and checks liger-kernel's layers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from spectral_paged.benchmarks import steps
from spectral_paged.benchmarks.results_io.result_file import model_label
from spectral_paged.benchmarks.throughput.random_models import load_random
from spectral_paged.errors import CapacityError, InvalidRequestError
from support.paths import ROOT
from support.tiny_model import tiny_model

KERNELS = ROOT / "kernels"


def test_every_kernel_of_ours_is_attention_or_sealing():
    names = {
        name
        for file in KERNELS.rglob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {"_attend_kernel", "_append_kernel", "_apply_kernel"} <= names
    assert {steps.kind_of(name) for name in names} == {"attention", "seal"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", "products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "products"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "rest"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp>", "rest"),
    ],
)
def test_kernels_of_others_are_told_by_their_names(name, kind):
    assert steps.kind_of(name) == kind


def test_results_name_a_local_model_without_the_path_to_it(tmp_path):
    file = tmp_path / "small.gguf"
    file.write_bytes(b"")
    assert model_label(str(file)) == "small.gguf"
    assert [model_label(m) for m in ("random:tiny", "org/name")] == ["random:tiny", "org/name"]


def test_gaps_are_where_nothing_runs_however_spans_overlap():
    assert steps.gaps([(0, 10), (2, 3), (12, 15), (11, 14), (15, 16), (20, 21)]) == [1, 4]
    assert steps.gaps([]) == []


def test_weights_of_a_step_leave_out_rows_that_are_looked_up_unless_the_head_is_the_same():
    model = tiny_model()
    table = model.get_input_embeddings().weight
    whole = sum(p.nbytes for p in model.parameters())
    assert model.get_output_embeddings().weight is not table
    assert steps.weight_bytes(model) == whole - table.nbytes
    model.get_output_embeddings().weight = table
    assert steps.weight_bytes(model) == whole - table.nbytes


def measured(monkeypatch, batch=2, context=20):
    """A row of a tiny model on the CPU, where the trace is made up: a kernel of 2 us in 3 us."""

    def trace(llm, count):
        steps._steps(llm, count)
        return [("_attend_kernel", (3.0 * i, 3.0 * i + 2)) for i in range(count)]

    monkeypatch.setattr(steps, "_trace", trace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    loaded = load_random("random:tiny", device=torch.device("cpu"), dtype=torch.float32)
    options = {"kv_cache_bytes": 16 << 20, "device": "cpu"}
    return steps.measure(loaded, "exact", "eager", batch, context, 1e9, **options)


def test_a_row_has_the_times_of_steps_in_which_every_sequence_decodes(monkeypatch):
    row = measured(monkeypatch)
    assert row.tokens_per_second == pytest.approx(2e3 / row.step_ms)
    assert row.kinds["attention"] == pytest.approx(2e-3) and row.kernels_per_step == 1
    assert row.idle_share == pytest.approx(9 / 29) and row.idle_between_steps_share == 0


@pytest.mark.parametrize("missing", [1, steps.TRACED + 1], ids=["traced", "timed"])
def test_steps_in_which_a_sequence_ends_make_no_row(monkeypatch, missing):
    monkeypatch.setattr(steps, "ROOM", 1 + steps.WARM + steps.TIMED + steps.TRACED - missing)
    with pytest.raises(CapacityError, match="2 x 20 tokens did not all decode in every step"):
        measured(monkeypatch)


def test_an_unknown_format_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(InvalidRequestError, match="--format int3: use auto, .*spectral-quality"):
        steps.main(
            model="random:none",
            formats=("exact", "int3"),
            layers=("eager",),
            batches=(1,),
            contexts=(8,),
            name="",
            output_dir=tmp_path,
        )


def test_unknown_layers_and_a_missing_liger_kernel_are_refused_by_name(monkeypatch, tmp_path):
    with pytest.raises(InvalidRequestError, match="--layers fused: use compiled, eager, liger"):
        steps.main(
            model="random:tiny",
            formats=("exact",),
            layers=("fused",),
            batches=(1,),
            contexts=(8,),
            name="",
            output_dir=tmp_path,
        )
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    with pytest.raises(InvalidRequestError, match="pip install liger-kernel"):
        steps.with_liger(SimpleNamespace(config=SimpleNamespace(model_type="llama")))
