"""Every kernel that a preset launches compiles for the GPUs that are served, and fits each of them.

None of them need be there. A few kernels of each kind of GPU are compiled here, those that are
closest to its limits among them; `make check-builds` compiles all of them for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from support.cards import CARDS
from support.paths import TESTS

EVERY = os.environ.get("CHECK_BUILDS") == "all"
# patterns of cases: the default preset where shared memory is smallest, the widest heads on 99 KB
QUALITY = "^spectral-quality, width 128, 4 "
FEW = {
    "sm_75": QUALITY,
    "sm_80": "^spectral-quality, width 64, 3 ",
    "sm_86": "^spectral-quality, width 256|sealing spectral-quality, width 128",
    "sm_89": "^spectral-quality, width 64, 3 ",
    "sm_90": (
        "^spectral-(quality|compact), width (64, 3|128, 4) |softcap|sinks|eigenvectors, width 128"
        "|(sealing|rebuilding) spectral-quality, width 128|^exact, width 128"
        "|^tiles of spectral-quality, width 128"
    ),
    "sm_100": QUALITY,
    "sm_120": QUALITY,
}
# bytes of a thread's stack: explicit kernels keep all in registers, and portable ones nearly all;
# those without tensor cores hold whole rows of operands
EXPLICIT_SPILL = 64
PORTABLE_SPILL = dict.fromkeys(CARDS, 8192) | {"sm_75": 12288}


def compiled():
    """A JSON line a kernel and kind of GPU, by a process that does not interpret kernels."""
    few = [f"--case={kind}={pattern}" for kind, pattern in FEW.items()]
    done = subprocess.run(
        [sys.executable, TESTS / "support", "compile_kernels", *(() if EVERY else few)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        timeout=7200 if EVERY else 600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Of all processes that share the tests, the first that needs them compiles for all."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "builds.jsonl"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            file.write_text(compiled(), encoding="utf-8")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_each_kind_of_gpu_has_its_kernels(builds):
    for kind in CARDS:
        assert len({b["kernel"] for b in builds if b["card"] == kind}) >= 2, kind


def test_kernels_fit_the_shared_memory_of_a_program(builds):
    assert [b for b in builds if b["shared"] > CARDS[b["card"]].shared_bytes] == []


def test_kernels_keep_to_the_registers_of_a_thread(builds):
    assert all(0 < b["registers"] <= 255 for b in builds)


def test_explicit_kernels_keep_everything_in_registers(builds):
    explicit = [b for b in builds if "gluon" in b["kernel"]]
    assert len(explicit) >= 10
    assert [b for b in explicit if b["spilled"] > EXPLICIT_SPILL] == []


def test_portable_kernels_spill_little(builds):
    assert [b for b in builds if b["spilled"] > PORTABLE_SPILL[b["card"]]] == []


def test_gluon_and_portable_kernels_are_chosen_by_the_gpu(builds):
    """Those of width 256 are portable everywhere, and all are on a GPU before sm_80."""
    for b in builds:
        if "attend._attend" in b["kernel"]:
            explicit = b["card"] != "sm_75" and "width 256" not in b["for"]
            assert ("gluon" in b["kernel"]) >= (explicit and "quality" in b["for"]), b
            assert ("triton" in b["kernel"]) or explicit, b


def test_the_widest_presets_have_explicit_kernels(builds):
    attended = {
        b["for"]
        for b in builds
        if b["kernel"] == "decode.gluon.attend._attend_kernel" and b["card"] == "sm_90"
    }
    for name in ("spectral-quality", "spectral-compact"):
        for shape in ("width 64, 3 queries", "width 128, 4 queries"):
            assert f"{name}, {shape}" in attended


def test_no_stride_is_multiplied_in_32_bits(builds):
    """Products with table_width (of sequences) and num_seqs (of query heads) stay below 2^31: the
    table's 2^31 entries would be 8 GiB."""
    assert {x for b in builds for x in b["int32_products"]} == {"table_width", "num_seqs"}
