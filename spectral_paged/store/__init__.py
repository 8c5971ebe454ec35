"""Tiers below the device's pages: records in host memory, found again by their keys.

The package knows bytes and keys, and nothing of pages, slots or sequences.
"""

from __future__ import annotations

from spectral_paged.store.copies import (
    Copier,
    Copy,
    HostCopier,
)
from spectral_paged.store.cuda import (
    CudaCopier,
)
from spectral_paged.store.host_tier import (
    HostRecord,
    HostTier,
)
from spectral_paged.store.memory import (
    HostMemory,
)

__all__ = [
    "Copier",
    "Copy",
    "CudaCopier",
    "HostCopier",
    "HostMemory",
    "HostRecord",
    "HostTier",
]
