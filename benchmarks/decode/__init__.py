"""Benchmarks of decode attention: speed against bf16 kernels, and the tuning of its launches."""

__all__ = [
    "flashinfer",
    "inputs",
    "report",
    "run",
    "shared",
    "tune",
]
