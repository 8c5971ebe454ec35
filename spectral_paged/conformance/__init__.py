"""A kit of checks for an embedder's serving loop around the cache.

The package imports the LLM and its dependencies.
"""

from __future__ import annotations

from spectral_paged.conformance.adapter import (
    Adapter,
    AdapterConfig,
    Evidence,
)
from spectral_paged.conformance.checks import (
    Conformance,
)

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Conformance",
    "Evidence",
    "inputs",
]
