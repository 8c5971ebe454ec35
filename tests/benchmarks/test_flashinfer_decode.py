"""FlashInfer as a baseline gets correct pages and tables, and a wrong output is not timed.

The library needs a GPU, so a stand-in with its interface reads the same arguments.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from spectral_paged.benchmarks.decode import flashinfer as flashinfer_decode
from spectral_paged.benchmarks.decode.flashinfer import best_ways

HEADS, DIM = 2, 16


class Wrapper:
    """Attention from the tables alone, token by token; `spoil` adds to the answer."""

    spoil, refuses = 0.0, False

    def __init__(self, workspace, kv_layout, use_tensor_cores):
        assert kv_layout == "NHD" and not bool(workspace.any())
        if Wrapper.refuses and use_tensor_cores:
            raise ValueError("no tensor cores\nhere")

    def plan(self, indptr, indices, last, q_heads, kv_heads, dim, page, q_data_type, kv_data_type):
        assert (kv_heads, dim) == (HEADS, DIM) and q_data_type == torch.bfloat16
        self.tables, self.page = (indptr.tolist(), indices.tolist(), last.tolist()), page
        assert all(1 <= n <= page for n in self.tables[2])

    def run(self, q, kv):
        indptr, indices, last = self.tables
        out = torch.zeros(q.shape)
        for i, query in enumerate(q):
            pages = indices[indptr[i] : indptr[i + 1]]
            tokens = [(p, t) for p in pages for t in range(self.page)]
            tokens = tokens[: len(tokens) - self.page + last[i]]
            for h, row in enumerate(query.float()):
                head = h // (q.shape[1] // HEADS)
                k = torch.stack([kv[p, 0, t, head].float() for p, t in tokens])
                v = torch.stack([kv[p, 1, t, head].float() for p, t in tokens])
                out[i, h] = ((k @ row) * DIM**-0.5).softmax(0) @ v
        return out + Wrapper.spoil


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_decode, "installed", lambda: True)
    monkeypatch.setattr(flashinfer_decode, "WORKSPACE_BYTES", 64)
    monkeypatch.setattr(Wrapper, "spoil", 0.0)
    monkeypatch.setattr(Wrapper, "refuses", False)


def rows(lengths=(1, 70, 33), times=None):
    q = torch.randn(len(lengths), 3 * HEADS, DIM).bfloat16()
    clock = iter(times or range(100, 0, -1))
    return list(best_ways(q, lengths, HEADS, lambda work: float(next(clock))))


def test_each_element_type_is_taken_at_its_fastest_way(library):
    times = [9, 8, 3, 7, 6, 5] + [4, 9, 9, 9, 9, 2]
    (bf16, ms, size), (fp8, fp8_ms, fp8_size) = rows(times=times)
    assert (bf16, ms) == ("flashinfer bf16, pages of 32", 3.0)
    assert (fp8, fp8_ms) == ("flashinfer fp8, pages of 64, tensor cores", 2.0)
    assert size == 2 * fp8_size == 104 * 2 * HEADS * DIM * 2


def test_a_wrong_answer_is_not_timed(library, monkeypatch, capsys):
    monkeypatch.setattr(Wrapper, "spoil", 0.5)
    assert rows() == [] and "not timed" in capsys.readouterr().out


def test_what_is_refused_is_said_and_the_rest_is_timed(library, monkeypatch, capsys):
    monkeypatch.setattr(Wrapper, "refuses", True)
    assert len(rows()) == 2
    assert "tensor cores: refused (no tensor cores)" in capsys.readouterr().out


def test_without_the_library_or_with_empty_sequences_there_is_nothing(library, monkeypatch):
    assert rows(lengths=(0, 5)) == []
    monkeypatch.setattr(flashinfer_decode, "installed", lambda: False)
    assert rows() == []
