"""Attention of prompt chunks over variable lengths."""

__all__ = [
    "gpu",
    "reference",
]
