"""Helpers that tests share, imported as `support`; README.md lists when to use which.

The folder of tests stays off the path, because its folders bear names (`kernels`, `scheduler`)
under which libraries look for packages of their own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def make_importable() -> None:
    """Make `import support` find this folder, wherever Python was started."""
    if "support" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "support", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["support"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
