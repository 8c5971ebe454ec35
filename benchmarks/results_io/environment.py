"""The machine, commit and versions that a result was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers


def environment() -> dict[str, object]:
    """Date, commit, machine and versions, for the head of a result file."""
    commit = os.environ.get("SPECTRAL_PAGED_COMMIT", "")  # a copy of the tree has no history
    try:
        commit = (
            commit
            or subprocess.run(
                ["git", "describe", "--always", "--dirty"],
                cwd=Path(__file__).resolve().parent,  # this code's repository, not the caller's
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
