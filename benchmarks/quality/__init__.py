"""How good pages are: divergence, needles, errors by layer, against peers."""

__all__ = [
    "run",
]
