"""What a request may say of its sampling, by the module name that scripts for vLLM import."""

from __future__ import annotations

from spectral_paged.outputs import RequestOutputKind
from spectral_paged.sampling import (
    BeamSearchParams,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)

__all__ = [
    "BeamSearchParams",
    "RepetitionDetectionParams",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]
