"""Every kernel that a preset launches compiles for Hopper and fits it, checked without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from support.paths import TESTS

SHARED_LIMIT = 227 * 1024  # bytes that a block may have on sm_90
SCRIPT = TESTS / "support"


@pytest.fixture(scope="module")
def builds():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "compile_kernels"],
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_kernels_fit_the_shared_memory_of_a_block(builds):
    assert [b for b in builds if b["shared"] > SHARED_LIMIT] == []


def test_explicit_kernels_keep_everything_in_registers(builds):
    explicit = [b for b in builds if "gluon" in b["kernel"]]
    assert len(explicit) >= 10
    assert [b for b in explicit if b["spilled"] > 64] == []


def test_the_widest_presets_have_explicit_kernels(builds):
    attended = {b["for"] for b in builds if b["kernel"] == "decode.gluon.attend._attend_kernel"}
    for name in ("spectral-quality", "spectral-compact"):
        for shape in ("width 64, 3 queries", "width 128, 4 queries", "width 128, 7 queries"):
            assert f"{name}, {shape}" in attended


def test_no_stride_is_multiplied_in_32_bits(builds):
    """Products with table_width (of sequences) and num_seqs (of query heads) stay below 2^31: the
    table's 2^31 entries would be 8 GiB."""
    assert {x for b in builds for x in b["int32_products"]} == {"table_width", "num_seqs"}
