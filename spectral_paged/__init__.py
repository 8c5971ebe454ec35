"""A paged KV cache whose pages are quantized spectral coefficients, with a batching engine."""

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
    """Import `LLM` on first use, because it imports transformers, which embedders may not need."""
    if name == "LLM":
        from spectral_paged.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
