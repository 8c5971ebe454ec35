"""Eigenvectors of many small symmetric matrices, in torch: the twin of the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def eigenvectors(matrices: Tensor) -> Tensor:
    """Orthonormal eigenvectors of positive semidefinite matrices `[N, D, D]`, fp32 or fp64.

    They are the rows of the result `[N, D, D]`, that of the largest eigenvalue first. Their signs
    are arbitrary.
    """
    _, columns = torch.linalg.eigh(matrices)  # ascending
    return columns.flip(-1).transpose(-1, -2).contiguous()
