"""Paths of the repository's files that tests read."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
TEXTS = ROOT / "examples" / "texts"
