"""Attention of one query a sequence to its pages and exact tokens."""

__all__ = [
    "exact_reference",
    "gluon",
    "gpu",
    "pages_gpu",
    "pages_reference",
    "parts",
    "plan",
    "reference",
    "triton",
]
