"""Unsloth's own code over the cache, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = "unsloth_cases.py", "unsloth_patch_cases.py", "unsloth_calibration_cases.py"
CASES = [
    *(str(FOLDER / name) for name in NAMES),
    str(FOLDER.parent / "benchmarks" / "unsloth_bench_cases.py"),
]


def test_unsloth_models_generate_over_the_cache():
    """Importing Unsloth rewrites transformers and wants the Triton interpreter: not in here."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *CASES],
        cwd=FOLDER.parents[1],
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
