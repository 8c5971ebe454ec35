"""Launch parameters of kernels by GPU; nothing is tuned while serving."""

__all__ = [
    "card",
    "configs",
]
