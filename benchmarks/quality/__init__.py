"""Benchmarks of quality: divergence, needles and errors by layer of pages and of their peers."""

__all__ = [
    "run",
]
