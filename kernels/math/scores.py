"""What happens to scores between their product and the softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def check_softcap(softcap: float | None) -> None:
    """Refuse a cap that is no cap.

    Raises:
        ValueError: zero or less; None is no cap.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: give a positive number, or None for no cap")


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """`softcap tanh(scores / softcap)`: scores stay inside (-softcap, softcap). Gemma 2, 2024.

    Raises:
        ValueError: a softcap that is not positive.
    """
    check_softcap(softcap)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
