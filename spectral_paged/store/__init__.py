"""Tiers below the device's pages: records in host memory and on disk, found again by their keys.

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
from spectral_paged.store.disk_tier import (
    DiskTier,
)
from spectral_paged.store.folder import (
    Entry,
    Folder,
)
from spectral_paged.store.host_tier import (
    HostRecord,
    HostTier,
)
from spectral_paged.store.memory import (
    HostMemory,
)
from spectral_paged.store.record_file import (
    BadRecordError,
    check_record,
)
from spectral_paged.store.tiers import (
    Tiers,
)

__all__ = [
    "BadRecordError",
    "Copier",
    "Copy",
    "CudaCopier",
    "DiskTier",
    "Entry",
    "Folder",
    "HostCopier",
    "HostMemory",
    "HostRecord",
    "HostTier",
    "Tiers",
    "check_record",
]
