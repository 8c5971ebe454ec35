"""OpenMP's threads on a CPU sleep while they wait, and are no more than a container grants.

By default a thread that has done its part of an operation spins for milliseconds. Where another
process wants the same cores, threads then spin while the ones that they wait for do not run, and
every operation takes a time slice. Sleeping costs some 50 microseconds an operation instead.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path


def granted_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The CPUs that a quota of the cgroup (version 2) grants, rounded up.

    None: there is no quota, or it is no less than the CPUs that the process may run on.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        granted = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or the quota is "max"
        return None
    return granted if granted < len(os.sched_getaffinity(0)) else None


def share_cores(environ: MutableMapping[str, str], granted: int | None) -> None:
    """Set OpenMP's variables, except those that the environment has already.

    OpenMP reads them once, when torch is loaded, so nothing is set where torch is loaded already.
    It counts by itself the CPUs that the process may run on, but knows no quota.
    """
    if "torch" in sys.modules:
        return
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if granted is not None:
        environ.setdefault("OMP_NUM_THREADS", str(granted))
