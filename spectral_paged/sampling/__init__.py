"""Sampling turns logits into token ids on the device, by each request's parameters.

The package imports `device` and `outputs` only.
"""

from __future__ import annotations

from spectral_paged.sampling.beam_search_params import (
    BeamSearchParams,
)
from spectral_paged.sampling.logits_processors import (
    LogitsProcessor,
    process,
)
from spectral_paged.sampling.logprobs import (
    LogitsVisitor,
    Sampled,
    TokenLogprobs,
    Wanted,
)
from spectral_paged.sampling.params import (
    SamplingParams,
)
from spectral_paged.sampling.penalties import (
    Penalties,
)
from spectral_paged.sampling.plain_values import (
    plain_list,
)
from spectral_paged.sampling.repetition import (
    RepetitionDetectionParams,
)
from spectral_paged.sampling.rules import (
    RULES,
    Rule,
)
from spectral_paged.sampling.sample_batch import (
    SampleBatch,
    SampleRow,
)
from spectral_paged.sampling.sampler import (
    PendingTokens,
    SampledTokens,
)
from spectral_paged.sampling.state import (
    SamplingState,
)
from spectral_paged.sampling.structured_outputs import (
    StructuredOutputsParams,
)

__all__ = [
    "BeamSearchParams",
    "LogitsProcessor",
    "LogitsVisitor",
    "Penalties",
    "PendingTokens",
    "RULES",
    "RepetitionDetectionParams",
    "Rule",
    "SampleBatch",
    "SampleRow",
    "Sampled",
    "SampledTokens",
    "SamplingParams",
    "SamplingState",
    "StructuredOutputsParams",
    "TokenLogprobs",
    "Wanted",
    "plain_list",
    "process",
]
