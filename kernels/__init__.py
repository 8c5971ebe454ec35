"""Attention ops over pages, with their fp32 twins. A leaf: tensors and integers, nothing else.

Each op has a folder: `reference` is the twin, `triton` and `gluon` what a GPU runs. The twin of the
seal kernel encodes by the codec, which a leaf may not know: it is the cache's `TorchEncoder`.
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
