"""Generation of Unsloth's models over the cache: `patch_unsloth_attention(model)` and back.

The package imports `models` and the packages below it.
"""

from __future__ import annotations

from spectral_paged.integrations.unsloth.patch import (
    patch_unsloth_attention,
    unpatch_unsloth_attention,
)

__all__ = [
    "checkpoints",
    "patch_unsloth_attention",
    "unpatch_unsloth_attention",
]
