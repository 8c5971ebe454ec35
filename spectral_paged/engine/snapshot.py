"""A snapshot of an LLM's figures, which the metrics export and the live view both show."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Protocol

from spectral_paged.engine.counters import Distribution
from spectral_paged.engine.engine import Engine

PREFIX = "spectral_paged:"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A figure of `llm.stats()` (`key`), exported under `PREFIX` and `name`.

    Names and meaning are vLLM's where vLLM has the figure. With a `label` the figure is a
    dictionary, whose keys become values of this label, one sample each.
    """

    name: str
    kind: Literal["gauge", "counter"]
    key: str
    help: str
    label: str | None = None


METRICS = (
    MetricSpec("num_requests_running", "gauge", "running", "Sequences that run now."),
    MetricSpec("num_requests_waiting", "gauge", "waiting", "Sequences that wait for a seat."),
    MetricSpec("kv_cache_usage_perc", "gauge", "kv_cache_usage", "Cache in use; 1 is all of it."),
    MetricSpec(
        "prefix_cache_queries",
        "counter",
        "prefix_query_tokens",
        "Prompt tokens looked up in the prefix cache when a request first ran.",
    ),
    MetricSpec(
        "prefix_cache_hits",
        "counter",
        "prefix_hit_tokens",
        "Prompt tokens found in the prefix cache when a request first ran.",
    ),
    MetricSpec(
        "prefix_cache_tier_hits",
        "counter",
        "prefix_hit_tokens_by_tier",
        "Prompt tokens found when a request first ran, by where they were (gpu, host, disk).",
        "tier",
    ),
    MetricSpec(
        "store_capacity_bytes",
        "gauge",
        "store_capacity_bytes",
        "Bytes that a tier below the cache may take.",
        "tier",
    ),
    MetricSpec("store_bytes", "gauge", "store_bytes", "Bytes in use in a tier.", "tier"),
    MetricSpec("store_records", "gauge", "store_records", "Records in a tier.", "tier"),
    MetricSpec(
        "store_written_bytes", "counter", "store_written_bytes", "Bytes written to a tier.", "tier"
    ),
    MetricSpec(
        "store_read_bytes", "counter", "store_read_bytes", "Bytes read from a tier.", "tier"
    ),
    MetricSpec(
        "store_evicted_records",
        "counter",
        "store_evicted_records",
        "Records that left a tier for others.",
        "tier",
    ),
    MetricSpec(
        "store_dropped_records",
        "counter",
        "store_dropped_records",
        "Records that a tier had no time or room to write.",
        "tier",
    ),
    MetricSpec(
        "store_failures", "counter", "store_failures", "Reads and writes that failed.", "tier"
    ),
    MetricSpec("num_preemptions", "counter", "preemptions", "Sequences that had to give way."),
    MetricSpec("prompt_tokens", "counter", "prompt_tokens", "Prompt tokens of served requests."),
    MetricSpec("generation_tokens", "counter", "generated_tokens", "Tokens generated."),
    MetricSpec(
        "request_success",
        "counter",
        "finished",
        "Completions by how they ended.",
        "finished_reason",
    ),
    MetricSpec(
        "request_refused",
        "counter",
        "refused",
        "Requests never queued, by the error's name.",
        "error",
    ),
    MetricSpec(
        "spec_decode_num_drafts", "counter", "spec_decode_num_drafts", "Drafts that were computed."
    ),
    MetricSpec(
        "spec_decode_num_draft_tokens",
        "counter",
        "spec_decode_num_draft_tokens",
        "Tokens of drafts.",
    ),
    MetricSpec(
        "spec_decode_num_accepted_tokens",
        "counter",
        "spec_decode_num_accepted_tokens",
        "Tokens of drafts that were the tokens to come.",
    ),
    MetricSpec(
        "spec_decode_num_accepted_tokens_per_pos",
        "counter",
        "spec_decode_num_accepted_tokens_per_pos",
        "The same by place in the draft.",
        "position",
    ),
    MetricSpec(
        "spec_decode_num_excluded_requests",
        "counter",
        "spec_decode_num_excluded_requests",
        "Requests without drafts, because the host computes what may come next.",
    ),
    MetricSpec(
        "recomputed_tokens",
        "counter",
        "recomputed_tokens",
        "Tokens computed a second time after a preemption.",
    ),
    MetricSpec("pages_sealed", "counter", "pages_sealed", "Pages written, counted layer by layer."),
    MetricSpec(
        "pages_attended", "counter", "pages_attended", "Page reads, counted layer by layer."
    ),
    MetricSpec(
        "pages_shared",
        "counter",
        "pages_shared",
        "Page reads that another sequence's read stood for, counted layer by layer.",
    ),
    MetricSpec(
        "seal_time_seconds",
        "counter",
        "seal_seconds",
        "Device time from the begin of each seal to its end.",
    ),
    MetricSpec(
        "seal_waiting_time_seconds",
        "counter",
        "seal_waiting_seconds",
        "How much of seal_time_seconds the device waited for the host, at most.",
    ),
    MetricSpec(
        "compression_ratio",
        "gauge",
        "compression_ratio",
        "Bytes at 2 an element over real bytes, of all sequences so far.",
    ),
    MetricSpec("bytes_per_token", "gauge", "bytes_per_token", "Real bytes of K and V a token."),
    MetricSpec(
        "sequence_capacity_tokens",
        "gauge",
        "capacity_tokens",
        "Tokens of context that the cache holds.",
    ),
)
DURATIONS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two tokens of a completion.",
    "e2e_request_latency_seconds": "From a request's arrival to its end; not of aborted ones.",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The figures of one LLM at one time.

    Attributes:
        time: seconds of a monotonic clock.
        values: by exported name and label value ("" where the figure has no label).
        durations: by exported name.
    """

    model_name: str
    engine: str
    time: float
    values: dict[tuple[str, str], float]
    durations: dict[str, Distribution]

    def value(self, name: str, label: str = "") -> float:
        return self.values.get((name, label), 0.0)

    def labels(self, name: str) -> dict[str, float]:
        """Return a labelled figure's values by label value."""
        return {label: x for (other, label), x in self.values.items() if other == name and label}


class Measured(Protocol):
    """What has figures, as an `LLM` does."""

    model_name: str
    engine: Engine


def take_snapshot(llm: Measured, engine: str = "0") -> Snapshot:
    """Read an LLM's figures now. Steps may run in another thread meanwhile."""
    stats, counters = llm.engine.stats(), llm.engine.counters
    values: dict[tuple[str, str], float] = {}
    for spec in METRICS:
        found = stats[spec.key]
        if isinstance(found, dict):
            values |= {(spec.name, label): float(x) for label, x in found.items()}
        else:
            assert isinstance(found, int | float), f"{spec.key} is no number"
            values[spec.name, ""] = float(found)
    held = (counters.time_to_first_token, counters.inter_token_latency, counters.request_latency)
    durations = {
        name: durations.distribution() for name, durations in zip(DURATIONS, held, strict=True)
    }
    return Snapshot(llm.model_name, engine, time.monotonic(), values, durations)
