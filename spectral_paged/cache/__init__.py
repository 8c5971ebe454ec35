"""Sequences over the pool: `SpectralKVCache` and the plan and report of a step.

It knows pools, pages, devices and kernels; it knows no model, no sampler and no scheduler.
"""

from __future__ import annotations

from spectral_paged.cache.cache import (
    SpectralKVCache,
)
from spectral_paged.cache.capacity import (
    Need,
    concurrency,
)
from spectral_paged.cache.history import (
    read_history,
)
from spectral_paged.cache.index import (
    HISTORY_TOKENS,
    DecodeBatch,
    DecodeRows,
    GroupStep,
    StepIndex,
)
from spectral_paged.cache.layer_group import (
    LayerGroup,
)
from spectral_paged.cache.layer_spec import (
    seals_behind,
)
from spectral_paged.cache.options import (
    CacheOptions,
    CacheOptionsDict,
)
from spectral_paged.cache.pins import (
    Spans,
    pinned_blocks,
    spans_of,
)
from spectral_paged.cache.plan import (
    PlanEntry,
    StepPlan,
    StepReport,
)
from spectral_paged.cache.sealer import (
    Sealer,
)

__all__ = [
    "CacheOptions",
    "CacheOptionsDict",
    "DecodeBatch",
    "DecodeRows",
    "GroupStep",
    "HISTORY_TOKENS",
    "LayerGroup",
    "Need",
    "PlanEntry",
    "Sealer",
    "Spans",
    "SpectralKVCache",
    "StepIndex",
    "StepPlan",
    "StepReport",
    "concurrency",
    "pinned_blocks",
    "read_history",
    "seals_behind",
    "spans_of",
]
