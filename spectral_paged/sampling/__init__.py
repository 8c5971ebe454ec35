"""Sampling turns logits into token ids on the device, by each request's parameters.

The package imports `device` only.
"""

from __future__ import annotations

from spectral_paged.sampling.params import (
    SamplingParams,
)
from spectral_paged.sampling.sampler import (
    PendingTokens,
    Sampled,
    SampledTokens,
    SampleRow,
)

__all__ = [
    "PendingTokens",
    "SampleRow",
    "Sampled",
    "SampledTokens",
    "SamplingParams",
]
