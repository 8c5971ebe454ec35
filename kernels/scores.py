"""What happens to scores between their product and the softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """`softcap tanh(scores / softcap)`: scores stay inside (-softcap, softcap). Gemma 2, 2024."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
