"""Threads on a CPU sleep while they wait, and are no more than a container grants."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spectral_paged.cpu_threads import granted_cpus, share_cores

OPENMP = {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    "said, granted",
    [
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("100001 100000\n", 2),
        ("399999 100000\n", None),
        ("400000 100000\n", None),
        ("6400000 100000\n", None),
        ("20000 10000\n", 2),
        ("max 100000\n", None),
        ("", None),
        (None, None),
    ],
)
def test_a_quota_counts_where_it_is_less_than_the_cpus(said, granted, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    if said is not None:
        (tmp_path / "cpu.max").write_text(said)
    assert granted_cpus(tmp_path) == granted


@pytest.mark.parametrize(
    "given, granted, then",
    [
        ({}, None, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({}, 3, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_NUM_THREADS": "5"}, 3, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "5"}),
    ],
)
def test_variables_that_are_set_already_stay(given, granted, then, monkeypatch):
    environ = dict(given)
    share_cores(environ, granted)
    assert environ == given, "torch is loaded in here, so it is too late"
    monkeypatch.delitem(sys.modules, "torch")
    share_cores(environ, granted)
    assert environ == then


# OpenMP says on stderr what it was told, when torch loads it
@pytest.mark.parametrize(
    "given, policy", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")]
)
def test_openmp_is_told_before_torch_loads_it(given, policy):
    environ = {name: value for name, value in os.environ.items() if name not in OPENMP}
    done = subprocess.run(
        [sys.executable, "-c", "import spectral_paged, torch"],
        env=environ | given | {"OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
