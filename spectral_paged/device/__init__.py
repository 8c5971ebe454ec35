"""Talking to a device: transfers, timers and where to place a cache.

It knows kernels at most, and nothing of pages or sequences.
"""

from __future__ import annotations

from spectral_paged.device.placement import (
    choose_cache_bytes,
    choose_device,
    choose_dtype,
)
from spectral_paged.device.timing import (
    DeviceTimer,
    StepClock,
)
from spectral_paged.device.transfers import (
    Download,
    upload,
    upload_rows,
)

__all__ = [
    "DeviceTimer",
    "Download",
    "StepClock",
    "choose_cache_bytes",
    "choose_device",
    "choose_dtype",
    "upload",
    "upload_rows",
]
