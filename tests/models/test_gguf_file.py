"""The GGUF container is read within bounds, and damage is a typed error."""

from __future__ import annotations

import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spectral_paged.errors import CorruptFileError, SpectralPagedError
from spectral_paged.models.gguf import GGUFFile
from spectral_paged.models.gguf.conversion import read_plan
from support.gguf_files import whole_files, write_gguf


def test_metadata_of_a_megabyte_costs_no_more_than_it_is(tmp_path):
    data = np.zeros(4_000_000, np.uint8)
    path = write_gguf(tmp_path / "long.gguf", keys={"general.data": data.tobytes()[:0] or [0]})
    head = struct.pack("<Q", 12) + b"general.data"
    raw = path.read_bytes()
    at = raw.index(head) + len(head)
    longer = raw[:at] + struct.pack("<IIQ", 9, 0, len(data)) + data.tobytes()
    path.write_bytes(longer)  # what follows does not matter: the array is read first
    begin = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(CorruptFileError):
        GGUFFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - begin < 5 and peak < 20 << 20


@pytest.mark.parametrize("limit", ["MAX_GGUF_STRINGS", "MAX_GGUF_METADATA_BYTES"])
def test_metadata_is_bounded(monkeypatch, limit):
    monkeypatch.setattr(f"spectral_paged.models.gguf.file.{limit}", 100)
    with pytest.raises(CorruptFileError, match="is it the right file"):
        GGUFFile(whole_files()["llama"])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_head_is_a_typed_error_or_another_model(tmp_path_factory, data):
    raw = bytearray(whole_files()["llama"].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw)
    try:
        read_plan(GGUFFile(path))
    except SpectralPagedError as error:
        assert len(str(error)) < 2000


def test_a_key_or_tensor_that_comes_twice_is_refused(tmp_path):
    path = write_gguf(tmp_path / "twice.gguf", keys={"general.aaaa": 1, "general.bbbb": 1})
    raw = path.read_bytes().replace(b"general.bbbb", b"general.aaaa")
    path.write_bytes(raw.replace(b"blk.0.ffn_norm.weight", b"blk.0.ffn_gate.weight"[:21]))
    with pytest.raises(CorruptFileError, match=r"general\.aaaa.*twice"):
        GGUFFile(path)
