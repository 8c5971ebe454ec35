"""Set-up that every test shares: import paths, the interpreter, seeds."""

from __future__ import annotations

import os
import pathlib
import runpy
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, here and in processes of tests

import pytest
import torch
from hypothesis import Phase, settings

# Tests import the installed package: with the repository root on the path, `import kernels` would
# find the source folder under a wrong name.
ROOT = str(pathlib.Path(__file__).resolve().parents[1])
sys.path[:] = [p for p in sys.path if p not in ("", ROOT)]

runpy.run_path(f"{pathlib.Path(__file__).parent}/support/__init__.py")["make_importable"]()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before kernels are imported
    from support import interpreter

    interpreter.patch_the_language_once()
    interpreter.make_shapes_once()
    interpreter.look_up_numpy_types_once()

# `make mutants` only asks which tests fail, so examples are not shrunk.
settings.register_profile("mutants", derandomize=True, phases=[Phase.explicit, Phase.generate])

# `make test-deep`: support.effort.examples asks for it
settings.register_profile("deep")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that differ from one process to the next, with which no two share the tests."""
    unstable = sorted({item.nodeid.split("[")[0] for item in items if " at 0x" in item.nodeid})
    if unstable:
        raise pytest.UsageError(f"give ids without addresses: {', '.join(unstable)}")
