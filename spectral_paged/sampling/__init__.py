"""Sampling: the parameters of a request, and token ids from logits on the device.

It knows devices alone.
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
