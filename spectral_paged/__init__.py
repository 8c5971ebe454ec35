"""Paged KV-cache block manager whose pages are spectral."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectral_paged.cache import CacheOptions, SpectralKVCache
from spectral_paged.engine import Engine
from spectral_paged.pages import PageFormat, SharedBasis
from spectral_paged.sampling import SamplingParams

if TYPE_CHECKING:
    from spectral_paged.llm import LLM

__all__ = [
    "LLM",
    "CacheOptions",
    "Engine",
    "PageFormat",
    "SamplingParams",
    "SharedBasis",
    "SpectralKVCache",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`LLM` pulls in transformers; embedders of the cache alone do not wait for it."""
    if name == "LLM":
        from spectral_paged.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
