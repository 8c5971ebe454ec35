"""Attention ops over pages, with their fp32 twins. A leaf: tensors and integers, nothing else.

Each op has a folder: `reference` is the twin, `triton` and `gluon` what a GPU runs.
"""

__all__ = [
    "chunk",
    "decode",
    "exact",
    "launch",
    "math",
    "ops",
    "page",
    "rebuild",
    "seal",
]
