"""Continuous batching: requests, steps and outputs over a cache and a scheduler.

It imports the cache, the sampler and the scheduler. The caller passes the model as a `Runner`.
"""

from __future__ import annotations

from spectral_paged.engine.admission import (
    check_request,
    most_tokens,
)
from spectral_paged.engine.beam_search import (
    BeamSearch,
)
from spectral_paged.engine.callers import (
    Callers,
    Inbox,
)
from spectral_paged.engine.chat_template import (
    ChatOptions,
)
from spectral_paged.engine.counters import (
    Distribution,
)
from spectral_paged.engine.deltas import (
    TextDeltas,
)
from spectral_paged.engine.engine import (
    Engine,
    Runner,
)
from spectral_paged.engine.events import (
    counted_refusal,
)
from spectral_paged.engine.messages import (
    MESSAGES_SCHEMA,
    Conversation,
    Message,
    check_messages,
    conversations,
)
from spectral_paged.engine.metrics import (
    Counter,
    Gauge,
    Histogram,
    Metric,
    Vector,
    metrics_of,
)
from spectral_paged.engine.prompts import (
    ENCODING_KEYS,
    Prompt,
    check_salt,
    params_list,
    parts_of,
    prompt_list,
)
from spectral_paged.engine.sleep import (
    Sleep,
)
from spectral_paged.engine.snapshot import (
    DURATIONS,
    METRICS,
    PREFIX,
    Snapshot,
    take_snapshot,
)
from spectral_paged.engine.turns import (
    Turns,
)

__all__ = [
    "BeamSearch",
    "Callers",
    "ChatOptions",
    "Conversation",
    "Counter",
    "DURATIONS",
    "Distribution",
    "ENCODING_KEYS",
    "Engine",
    "Gauge",
    "Histogram",
    "Inbox",
    "MESSAGES_SCHEMA",
    "METRICS",
    "Message",
    "Metric",
    "PREFIX",
    "Prompt",
    "Runner",
    "Sleep",
    "Snapshot",
    "TextDeltas",
    "Turns",
    "Vector",
    "check_messages",
    "check_request",
    "check_salt",
    "conversations",
    "counted_refusal",
    "metrics_of",
    "most_tokens",
    "params_list",
    "parts_of",
    "prompt_list",
    "take_snapshot",
]
