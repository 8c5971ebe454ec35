"""A decode step does as much for many sequences as for one: its work is counted, not timed."""

from __future__ import annotations

import json

import pytest
import torch

from spectral_paged.benchmarks import host
from spectral_paged.cli.commands import main
from spectral_paged.outputs import RequestOutputKind

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_length(monkeypatch):
    monkeypatch.setattr(host, "SHORTEST", 1030)  # so that no page begins or ends for 50 steps
    monkeypatch.setattr(host, "LONGEST", 1030)


def work(monkeypatch, format, batch, num_steps=20, **params):
    """Tensor operations, and tensors made of the host's values, in steps of `batch` sequences."""
    engine = host.decoding(format, batch, CPU, RequestOutputKind.FINAL_ONLY, **params)
    for _ in range(3):
        engine.step()
    made, as_tensor = [], torch.as_tensor
    with monkeypatch.context() as patch, host.Operations() as operations:
        patch.setattr(torch, "as_tensor", lambda *a, **k: made.append(1) or as_tensor(*a, **k))
        for _ in range(num_steps):
            engine.step()
    assert engine.counters.generated_tokens >= batch * num_steps
    return operations.count, len(made)


@pytest.mark.parametrize("format", ["exact", "spectral-quality"])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "seed": 3}, {"presence_penalty": 0.5}],
    ids=["greedy", "drawn", "penalised"],
)
def test_a_step_runs_as_many_operations_for_many_sequences_as_for_two(monkeypatch, format, params):
    few, many = (work(monkeypatch, format, batch, **params) for batch in (2, 41))
    assert few == many


def test_sampling_parameters_are_uploaded_once(monkeypatch):
    params = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "seed": 3}
    greedy, drawn = (work(monkeypatch, "exact", 5, **p)[1] for p in ({"temperature": 0.0}, params))
    assert drawn == greedy


def test_a_row_has_the_time_and_the_operations_of_a_step(tmp_path, capsys):
    code = main(
        ["bench", "host", "--format", "exact", "--batch", "2", "--output-dir", str(tmp_path)]
    )
    rows = json.loads((tmp_path / "host-cpu.json").read_text())["rows"]
    assert code == 0 and [row["outputs"] for row in rows] == ["final_only", "cumulative"]
    assert all(row["median_us"] > 0 and row["ops"] >= 10 for row in rows)
    assert "median" in capsys.readouterr().out
