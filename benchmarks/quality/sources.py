"""Digests of the code that made a result.

Comments and docstrings do not count, so that results stay valid when they are reworded.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

BENCH = "spectral_paged.benchmarks.quality"
HARNESS = (  # modules that every number depends on
    *(f"{BENCH}.{name}" for name in ("divergence", "methods", "peers", "replay")),
    f"{BENCH}.shared_attention",
    "spectral_paged.kernels.math.rotary",
)
CODEC = (  # modules that the numbers of our formats depend on as well
    *(f"spectral_paged.pages.{name}" for name in ("codec", "decompose", "sections", "quantize")),
    *(f"spectral_paged.pages.{name}" for name in ("page_mean", "shared_basis")),
    f"{BENCH}.page_methods",
    *(f"spectral_paged.kernels.page.{name}" for name in ("bit_packing", "layout", "view")),
)


def code_of(source: str) -> str:
    """A dump of the syntax tree of `source`, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = node.body[1:] if ast.get_docstring(node) else node.body
    return ast.dump(tree)


def sources_digest(names: Sequence[str]) -> str:
    """A digest of 16 hex digits of the code of modules, which are found but not imported."""
    digest = hashlib.sha256()
    for name in names:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        digest.update(code_of(Path(spec.origin).read_text("utf-8")).encode())
    return digest.hexdigest()[:16]


@functools.cache
def harness_digest() -> str:
    """The digest of the replay and the peers, which is part of a journal's name."""
    return sources_digest(HARNESS)


@functools.cache
def codec_digest() -> str:
    """The digest of the codec, in the key of our formats only, so that the peers' results last."""
    return sources_digest(CODEC)
