"""Encoding of blocks into spectral pages on a GPU, and eigenvectors for page bases."""

__all__ = [
    "eigenvectors",
    "triton",
]
