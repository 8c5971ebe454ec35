"""`python tests/support NAME ...` runs a module of this folder as a script."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("__init__.py")))["make_importable"]()
sys.path.pop(0)  # this folder, or its modules could be imported under two names
del sys.argv[0]
runpy.run_module(f"support.{sys.argv[0]}", run_name="__main__", alter_sys=True)
