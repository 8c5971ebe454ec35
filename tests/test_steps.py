"""The benchmark of a decode step: what it makes of a trace, of weights and of liger-kernel."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_model import tiny_model

from spectral_paged.benchmarks import steps
from spectral_paged.errors import InvalidRequestError

KERNELS = Path(__file__).parents[1] / "kernels"


def test_every_kernel_of_ours_is_attention_or_sealing():
    names = {
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {"_attend_kernel", "_append_kernel", "_merge_kernel"} <= names
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


def test_unknown_layers_and_a_missing_liger_kernel_are_refused_by_name(monkeypatch, tmp_path):
    with pytest.raises(InvalidRequestError, match="--layers fused: use compiled, eager, liger"):
        steps.main(
            model="random:tiny", formats=("exact",), layers=("fused",), batches=(1,),
            contexts=(8,), name="", output_dir=tmp_path,
        )  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    with pytest.raises(InvalidRequestError, match="pip install liger-kernel"):
        steps.with_liger(SimpleNamespace(config=SimpleNamespace(model_type="llama")))
