"""Encoding of blocks where they lie, and the eigenvectors it takes."""

__all__ = [
    "eigenvectors",
    "triton",
]
