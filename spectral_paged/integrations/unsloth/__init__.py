"""Unsloth's models over the cache: `patch_unsloth_attention(model)` and back.

It knows models and what lies below them.
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
