"""Attention of prompt chunks over variable lengths."""

__all__ = [
    "backend",
    "fa3",
    "gpu",
    "reference",
]
