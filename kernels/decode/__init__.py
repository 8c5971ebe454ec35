"""Attention of one query a sequence to its pages and exact tokens."""

__all__ = [
    "batch",
    "gluon",
    "gpu",
    "parts",
    "plan",
    "reference",
    "shared_pages",
    "triton",
]
