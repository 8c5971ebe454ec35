"""Attention ops over pages, with their fp32 twins in torch.

The package is a leaf: it takes tensors and integers, and imports no other package of the project.
Each op has a folder: `reference` is the twin, and a GPU runs `triton` and `gluon`. The twin of the
seal kernel is the cache's `TorchEncoder`, because it needs the codec, which a leaf may not import.
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
