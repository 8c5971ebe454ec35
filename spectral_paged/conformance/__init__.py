"""A kit that certifies somebody else's loop around the cache.

It knows the LLM and what lies below it.
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
