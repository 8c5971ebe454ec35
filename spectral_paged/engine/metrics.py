"""The figures of an LLM as objects, under vLLM's names."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from spectral_paged.engine.snapshot import DURATIONS, METRICS, PREFIX, Snapshot


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure, with labels that tell it from others of its name."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """A figure that only grows."""

    value: float


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """A figure that goes up and down."""

    value: float


@dataclass(frozen=True, slots=True)
class Vector(Metric):
    """A list of figures that only grow: accepted tokens of drafts, by place in the draft."""

    values: list[int]


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """Observations: their number, their sum, and how many are at most as large as each bound.

    `buckets`: counts by bound; the last one is `+Inf`, and has all.
    """

    count: int
    sum: float
    buckets: dict[str, int]


def metrics_of(snapshot: Snapshot) -> list[Metric]:
    """Return the figures of a snapshot, in the order of `/metrics`."""
    where = {"model_name": snapshot.model_name, "engine": snapshot.engine}
    found: list[Metric] = []
    for spec in METRICS:
        kind = Gauge if spec.kind == "gauge" else Counter
        if spec.label is None:
            found.append(kind(PREFIX + spec.name, where, _plain(snapshot.value(spec.name))))
            continue
        if spec.label == "position":
            values = [int(x) for x in snapshot.labels(spec.name).values()]
            found.append(Vector(PREFIX + spec.name, where, values))
            continue
        for label, value in snapshot.labels(spec.name).items():
            found.append(kind(PREFIX + spec.name, where | {spec.label: label}, _plain(value)))
    for name in DURATIONS:
        held = snapshot.durations[name]
        below = list(itertools.accumulate(int(count) for count in held.counts))
        bounds = [*(str(float(bound)) for bound in held.bounds), "+Inf"]
        buckets = dict(zip(bounds, below, strict=True))
        found.append(Histogram(PREFIX + name, where, below[-1], held.total, buckets))
    return found


def _plain(value: float) -> float:
    return int(value) if value.is_integer() else value
