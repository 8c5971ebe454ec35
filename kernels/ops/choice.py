"""The choice of the ops for a device. It depends on the device only: no op falls back."""

from __future__ import annotations

from functools import cache

import torch

from spectral_paged.kernels.ops.protocol import PageOps
from spectral_paged.kernels.ops.reference import TorchOps


@cache
def page_ops(device: torch.device) -> PageOps:
    """The ops that run on `device`; Triton is imported only for CUDA."""
    if device.type != "cuda":
        return TorchOps()
    from spectral_paged.kernels.ops.gpu import GpuOps

    return GpuOps()
