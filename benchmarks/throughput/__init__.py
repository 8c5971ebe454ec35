"""Benchmarks of whole workloads: the engine beside transformers' own generation."""

__all__ = [
    "run",
    "suites",
    "workload",
]
