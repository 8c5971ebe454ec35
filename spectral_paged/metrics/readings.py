"""One reading of an LLM's figures: what the metrics export and the live view both show."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from spectral_paged.engine import Distribution
from spectral_paged.llm import LLM

PREFIX = "spectral_paged:"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of `llm.stats()` under the name that it is exported by, `PREFIX` in front.

    Names and meaning are vLLM's where vLLM has the figure. `label`: the figure is a dictionary, a
    sample for each key under this label.
    """

    name: str
    kind: Literal["gauge", "counter"]
    key: str
    help: str
    label: str | None = None


FIGURES = (
    Figure("num_requests_running", "gauge", "running", "Sequences that run now."),
    Figure("num_requests_waiting", "gauge", "waiting", "Sequences that wait for a seat."),
    Figure("kv_cache_usage_perc", "gauge", "kv_cache_usage", "Cache in use; 1 is all of it."),
    Figure(
        "prefix_cache_queries",
        "counter",
        "prefix_query_tokens",
        "Prompt tokens looked up in the prefix cache when a request first ran.",
    ),
    Figure(
        "prefix_cache_hits",
        "counter",
        "prefix_hit_tokens",
        "Prompt tokens found in the prefix cache when a request first ran.",
    ),
    Figure("num_preemptions", "counter", "preemptions", "Sequences that had to give way."),
    Figure("prompt_tokens", "counter", "prompt_tokens", "Prompt tokens of served requests."),
    Figure("generation_tokens", "counter", "generated_tokens", "Tokens generated."),
    Figure(
        "request_success",
        "counter",
        "finished",
        "Completions by how they ended.",
        "finished_reason",
    ),
    Figure(
        "request_refused",
        "counter",
        "refused",
        "Requests never queued, by the error's name.",
        "error",
    ),
    Figure(
        "recomputed_tokens",
        "counter",
        "recomputed_tokens",
        "Tokens computed a second time after a preemption.",
    ),
    Figure("pages_sealed", "counter", "pages_sealed", "Pages written, counted layer by layer."),
    Figure("pages_attended", "counter", "pages_attended", "Page reads, counted layer by layer."),
    Figure("seal_time_seconds", "counter", "seal_seconds", "Device time spent on sealing."),
    Figure(
        "compression_ratio",
        "gauge",
        "compression_ratio",
        "Bytes at 2 an element over real bytes, of all sequences so far.",
    ),
    Figure("bytes_per_token", "gauge", "bytes_per_token", "Real bytes of K and V a token."),
    Figure(
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
class Reading:
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
        """A labelled figure's values by label."""
        return {label: x for (other, label), x in self.values.items() if other == name and label}


def read(llm: LLM, engine: str = "0") -> Reading:
    """The figures now; steps may run meanwhile, in another thread."""
    stats, counters = llm.stats(), llm.engine.counters
    values: dict[tuple[str, str], float] = {}
    for figure in FIGURES:
        found = stats[figure.key]
        if isinstance(found, dict):
            values |= {(figure.name, label): float(x) for label, x in found.items()}
        else:
            assert isinstance(found, int | float), f"{figure.key} is no number"
            values[figure.name, ""] = float(found)
    held = (counters.time_to_first_token, counters.inter_token_latency, counters.request_latency)
    durations = {
        name: durations.distribution() for name, durations in zip(DURATIONS, held, strict=True)
    }
    return Reading(llm.model_name, engine, time.monotonic(), values, durations)
