"""Attention of one query a sequence to its pages and exact tokens."""

__all__ = [
    "gluon",
    "gpu",
    "parts",
    "plan",
    "reference",
    "triton",
]
