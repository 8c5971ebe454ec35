"""Prompts that come back from host memory and disk, timed against computing them."""

__all__ = [
    "run",
]
