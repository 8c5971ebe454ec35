"""Prometheus export of an LLM's figures: `pip install '.[metrics]'`.

```python
from prometheus_client import CollectorRegistry, start_http_server
from spectral_paged.metrics import MetricsCollector

registry = CollectorRegistry()
MetricsCollector(llm, registry=registry)       # or several: MetricsCollector(a, b, ...)
start_http_server(9100, addr="127.0.0.1", registry=registry)
```

Figures are read when a scrape arrives, so a step does no work for them.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from spectral_paged.engine import (
    DURATIONS,
    METRICS,
    PREFIX,
    Distribution,
    Snapshot,
    take_snapshot,
)
from spectral_paged.errors import CorruptFileError, missing_extra
from spectral_paged.llm import LLM

try:
    from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.parser import text_string_to_metric_families
    from prometheus_client.registry import Collector
    from prometheus_client.utils import floatToGoString
except ImportError as error:
    raise missing_extra("metrics need the package prometheus-client", "metrics") from error

LABELS = ("model_name", "engine")


class MetricsCollector(Collector):
    """Exports metrics of one LLM or several, with the labels `model_name` and `engine`.

    The collector has weak references: an LLM without other references is no longer exported.

    Args:
        llms: the LLMs; the label `engine` is the index, 0, 1, ...
        registry: where the collector registers itself; prometheus-client's own by default. A
            registry takes one collector, to which further LLMs are added with `add`.
    """

    def __init__(self, *llms: LLM, registry: CollectorRegistry = REGISTRY) -> None:
        self._llms: dict[str, weakref.ref[LLM]] = {}
        self._numbers = itertools.count()
        for llm in llms:
            self.add(llm)
        registry.register(self)

    def add(self, llm: LLM) -> str:
        """Export another LLM and return its `engine` label."""
        engine = str(next(self._numbers))
        self._llms[engine] = weakref.ref(llm)
        return engine

    def describe(self) -> Iterable[Metric]:
        """Return the families without samples, which a registry reads at registration."""
        return _families([])

    def collect(self) -> Iterable[Metric]:
        held = [(engine, ref()) for engine, ref in list(self._llms.items())]
        return _families([take_snapshot(llm, engine) for engine, llm in held if llm is not None])


def _families(snapshots: list[Snapshot]) -> Iterator[Metric]:
    for spec in METRICS:
        family = GaugeMetricFamily if spec.kind == "gauge" else CounterMetricFamily
        names = (*LABELS, *([spec.label] if spec.label else []))
        metric = family(PREFIX + spec.name, spec.help, labels=names)
        for snapshot in snapshots:
            where = [snapshot.model_name, snapshot.engine]
            if spec.label is None:
                metric.add_metric(where, snapshot.value(spec.name))
                continue
            for label, value in snapshot.labels(spec.name).items():
                metric.add_metric([*where, label], value)
        yield metric
    for name, text in DURATIONS.items():
        histogram = HistogramMetricFamily(PREFIX + name, text, labels=LABELS)
        for snapshot in snapshots:
            found = snapshot.durations[name]
            bounds = [floatToGoString(b) for b in (*found.bounds, float("inf"))]
            below = list(itertools.accumulate(map(float, found.counts)))
            histogram.add_metric(
                [snapshot.model_name, snapshot.engine],
                list(zip(bounds, below, strict=True)),
                found.total,
            )
        yield histogram


@contextmanager
def serving(port: int, host: str = "127.0.0.1") -> Iterator[tuple[MetricsCollector, int]]:
    """Serve metrics at `http://host:port/metrics` inside; yield the collector and the port.

    The collector has no LLMs yet. Port 0 takes any free port.

    Raises:
        OSError: the port is taken or may not be used.
    """
    registry = CollectorRegistry()
    collector = MetricsCollector(registry=registry)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise OSError(
            f"metrics cannot be served at {host}:{port} ({error}): name another --metrics-port"
        ) from error
    try:
        yield collector, server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def parse(text: str) -> list[Snapshot]:
    """Parse an exposition into snapshots, one for each LLM, in order of their `engine` labels.

    Raises:
        CorruptFileError: the text is no exposition, or has none of this package's metrics.
    """
    values: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    buckets: dict[tuple[str, str], dict[str, dict[float, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    label_of = {spec.name: spec.label for spec in METRICS}
    try:
        for family in text_string_to_metric_families(text):
            name = family.name.removeprefix(PREFIX)
            for sample in family.samples if family.name.startswith(PREFIX) else ():
                where = sample.labels["model_name"], sample.labels["engine"]
                if name in label_of:
                    label = sample.labels.get(label_of[name] or "", "")
                    values[where][name, label] = sample.value
                elif name in DURATIONS and sample.name.endswith("_bucket"):
                    buckets[where][name][float(sample.labels["le"])] = sample.value
                elif name in DURATIONS and sample.name.endswith("_sum"):
                    totals[where][name] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise CorruptFileError(f"this is no metrics text: {error!r}") from error
    if not values:
        raise CorruptFileError(f"there is no metric named {PREFIX}...: is it another program's?")
    now = time.monotonic()
    return [
        Snapshot(
            *where,
            now,
            values[where],
            {
                name: _distribution(buckets[where][name], totals[where].get(name, 0.0))
                for name in DURATIONS
            },
        )
        for where in sorted(values, key=lambda where: (len(where[1]), where))
    ]


def _distribution(below: dict[float, float], total: float) -> Distribution:
    """Return a distribution from an exposition's buckets, whose counts are cumulative."""
    bounds = sorted(below)
    counts = np.diff([below[b] for b in bounds], prepend=0.0) if bounds else [0]
    return Distribution(tuple(bounds[:-1]), tuple(int(count) for count in counts), total)
