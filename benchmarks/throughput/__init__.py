"""Whole workloads through the engine and what users would run instead."""

__all__ = [
    "run",
    "suites",
    "workload",
]
