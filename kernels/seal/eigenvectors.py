"""Eigenvectors of many small symmetric matrices: the torch twin."""

from __future__ import annotations

import torch
from torch import Tensor


def eigenvectors(matrices: Tensor) -> Tensor:
    """Orthonormal eigenvectors of positive semidefinite matrices `[N, D, D]`, fp32 or fp64, as
    rows, strongest first: `[N, D, D]`. Signs are free."""
    _, columns = torch.linalg.eigh(matrices)  # ascending
    return columns.flip(-1).transpose(-1, -2).contiguous()
