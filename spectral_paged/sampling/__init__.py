"""Sampling turns logits into token ids on the device, by each request's parameters.

The package imports `device` only.
"""

from __future__ import annotations

from spectral_paged.sampling.params import (
    RULES,
    Rule,
    SamplingParams,
)
from spectral_paged.sampling.penalties import (
    Penalties,
)
from spectral_paged.sampling.plain_values import (
    plain_list,
)
from spectral_paged.sampling.sampler import (
    PendingTokens,
    Sampled,
    SampledTokens,
    SampleRow,
)

__all__ = [
    "Penalties",
    "PendingTokens",
    "RULES",
    "Rule",
    "SampleRow",
    "Sampled",
    "SampledTokens",
    "SamplingParams",
    "plain_list",
]
