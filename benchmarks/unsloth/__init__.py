"""Benchmarks of Unsloth's models with and without the patch."""

__all__ = [
    "needles",
    "run",
]
