"""The ops over pages for a device: torch twins on the CPU, kernels on CUDA."""

from spectral_paged.kernels.ops.choice import (
    page_ops,
)
from spectral_paged.kernels.ops.protocol import (
    PageOps,
    SealKernel,
)
from spectral_paged.kernels.ops.reference import (
    TorchOps,
)

__all__ = [
    "PageOps",
    "SealKernel",
    "TorchOps",
    "page_ops",
]
