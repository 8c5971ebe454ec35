"""The memory of a decode step is counted before there is a cache: it is what the step takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spectral_paged import PageFormat
from spectral_paged.kernels.decode.gpu import decode_attention
from spectral_paged.kernels.ops.gpu import GpuOps
from spectral_paged.models.activation_memory import graph_bytes
from support.kernel_cases import attend, attend_case
from support.kernel_launches import record_launches

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, group",
    [("quality-64", 1), ("quality-64", 7), ("int8-128", 4), ("slots-without-gain", 7)],
)
def test_the_bytes_counted_are_those_that_a_layer_takes(monkeypatch, name, group):
    (q, plane, exact_table, tokens, *_), options = attend_case(name, (1, 1), (65, 1), group=group)
    table = torch.zeros(2, 301, dtype=torch.int32)  # many pages; which, is read by kernels only
    args = (q, plane, exact_table, tokens, table, torch.tensor([300, 1], dtype=torch.int32))
    record_launches(monkeypatch)  # the kernels themselves take nothing
    real, taken = torch.empty, []

    def empty(*shape, **given):
        found = real(*shape, **given)
        taken.append(found.nbytes)
        return found

    monkeypatch.setattr(torch, "empty", empty)
    attend(decode_attention, args, options)
    pages = args[4].numel()  # the table's size bounds the entries of a step without a plan
    exact, of_pages = sum(taken[:2]), sum(taken[2:])  # the first two are parts over exact pages
    counted = GpuOps().decode_scratch_bytes(
        options["layout"], 2 * group, CPU, num_seqs=2, max_entries=pages
    )
    assert of_pages <= counted <= 1.05 * of_pages and exact < 0.05 * counted


@pytest.mark.parametrize("max_model_len, digits", [(32_768, 537e6), (131_072, 2.1e9)])
def test_an_8b_shape_counts_the_digits_of_its_page_reads(max_model_len, digits):
    geometry = SimpleNamespace(num_layers=32, num_q_heads=32, vocab_size=128_256)
    format = PageFormat.preset("spectral-quality", num_kv_heads=8, head_dim=128)
    found = {
        rows: graph_bytes(
            geometry,
            format,
            GpuOps(),
            CPU,
            num_rows=rows,
            max_model_len=max_model_len,
            memory=1 << 40,
        )
        for rows in (1, 256)
    }
    assert digits < found[256] < 1.5 * digits and found[1] < 0.1 * digits
    exact = PageFormat.preset("exact", num_kv_heads=8, head_dim=128)
    logits = 4 * 256 * geometry.vocab_size
    given = {"num_rows": 256, "max_model_len": max_model_len, "memory": 1 << 40}
    assert graph_bytes(geometry, exact, GpuOps(), CPU, **given) == logits
