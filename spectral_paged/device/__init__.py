"""Transfers to and from a device, timers, and the choice of device, dtype and memory.

The package may import kernels; it imports neither pages nor sequences.
"""

from __future__ import annotations

from spectral_paged.device.placement import (
    check_device,
    check_utilization,
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
    "check_device",
    "check_utilization",
    "choose_cache_bytes",
    "choose_device",
    "choose_dtype",
    "upload",
    "upload_rows",
]
