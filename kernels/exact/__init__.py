"""Exact pages: appending to them and reading them."""

__all__ = [
    "reference",
    "triton",
]
