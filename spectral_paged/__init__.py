"""A paged KV cache whose pages are quantized spectral coefficients, with a batching engine.

Importing the package settles how torch's threads wait, which must be before torch is loaded, and
imports nothing else. Names and modules are imported on first use, so the command line answers
`--help` before torch is loaded, and embedders need no transformers.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from spectral_paged import cpu_threads

if TYPE_CHECKING:
    from spectral_paged.cache import SpectralKVCache
    from spectral_paged.engine import Engine
    from spectral_paged.llm import LLM
    from spectral_paged.options import AsyncEngineArgs, CacheOptions, EngineArgs, LoRARequest
    from spectral_paged.outputs import CompletionOutput, RequestOutput, RequestOutputKind
    from spectral_paged.pages import PageFormat, SharedBasis
    from spectral_paged.sampling import BeamSearchParams, SamplingParams, StructuredOutputsParams
    from spectral_paged.server.async_llm import AsyncLLM
    from spectral_paged.server.llm_engine import LLMEngine

    __version__: str

__all__ = [
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchParams",
    "CacheOptions",
    "CompletionOutput",
    "Engine",
    "EngineArgs",
    "LLM",
    "LLMEngine",
    "LoRARequest",
    "PageFormat",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SharedBasis",
    "SpectralKVCache",
    "StructuredOutputsParams",
]
_HOMES = {
    "AsyncEngineArgs": "options",
    "AsyncLLM": "server.async_llm",
    "BeamSearchParams": "sampling",
    "CacheOptions": "options",
    "CompletionOutput": "outputs",
    "Engine": "engine",
    "EngineArgs": "options",
    "LLM": "llm",
    "LLMEngine": "server.llm_engine",
    "LoRARequest": "options",
    "PageFormat": "pages",
    "RequestOutput": "outputs",
    "RequestOutputKind": "outputs",
    "SamplingParams": "sampling",
    "SharedBasis": "pages",
    "SpectralKVCache": "cache",
    "StructuredOutputsParams": "sampling",
}

cpu_threads.share_cores(os.environ, cpu_threads.granted_cpus())


def __getattr__(name: str) -> object:
    """Import the module of a public name, or a module of the package, when it is asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("spectral-paged")
    if name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
