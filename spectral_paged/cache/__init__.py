"""The paged KV cache: sequences over the pool, `SpectralKVCache`, and a step's plan and report.

The package imports pools, pages, devices and kernels, but no model, sampler or scheduler.
"""

from __future__ import annotations

from spectral_paged.cache.build import (
    check_cache,
)
from spectral_paged.cache.cache import (
    SpectralKVCache,
)
from spectral_paged.cache.decode_rows import (
    DecodeRows,
)
from spectral_paged.cache.encoder import (
    Encoder,
)
from spectral_paged.cache.encoder_choice import (
    replace_encoders,
)
from spectral_paged.cache.history import (
    read_history,
)
from spectral_paged.cache.index import (
    HISTORY_TOKENS,
    GroupStep,
    StepIndex,
)
from spectral_paged.cache.memory import (
    give_memory_back,
    take_memory_again,
)
from spectral_paged.cache.observer import (
    CacheObserver,
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
from spectral_paged.cache.prefix_tiles import (
    PrefixTiles,
    TiledReads,
)
from spectral_paged.cache.replay import (
    ReplayedSteps,
)
from spectral_paged.cache.retention import (
    retention_of,
)
from spectral_paged.cache.visibility import (
    Visibility,
)

__all__ = [
    "CacheObserver",
    "DecodeRows",
    "Encoder",
    "GroupStep",
    "HISTORY_TOKENS",
    "PlanEntry",
    "PrefixTiles",
    "ReplayedSteps",
    "Spans",
    "SpectralKVCache",
    "StepIndex",
    "StepPlan",
    "StepReport",
    "TiledReads",
    "Visibility",
    "check_cache",
    "give_memory_back",
    "pinned_blocks",
    "read_history",
    "replace_encoders",
    "retention_of",
    "spans_of",
    "take_memory_again",
]
