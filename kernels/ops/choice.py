"""Which ops run on a device. Nothing else decides, and nothing falls back."""

from __future__ import annotations

from functools import cache

import torch

from spectral_paged.kernels.ops.protocol import PageOps
from spectral_paged.kernels.ops.reference import TorchOps


@cache
def page_ops(device: torch.device) -> PageOps:
    """The ops that run on `device`; Triton is imported only where kernels run."""
    if device.type != "cuda":
        return TorchOps()
    from spectral_paged.kernels.ops.gpu import GpuOps

    return GpuOps()
