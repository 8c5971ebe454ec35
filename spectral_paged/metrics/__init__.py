"""Figures of a running LLM: objects, Prometheus metrics, a live view.

The package imports the LLM and its dependencies. Prometheus metrics and the view need packages
outside the base install, so they are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectral_paged.engine import Counter, Gauge, Histogram, Metric, Vector

if TYPE_CHECKING:
    from spectral_paged.metrics.prometheus import MetricsCollector, serving

__all__ = [
    "Counter",
    "Gauge",
    "Histogram",
    "Metric",
    "MetricsCollector",
    "Vector",
    "prometheus",
    "serving",
    "top",
]


def __getattr__(name: str) -> object:
    """Import `MetricsCollector` and `serving` on first use; they need `prometheus-client`."""
    if name in ("MetricsCollector", "serving"):
        from spectral_paged.metrics import prometheus

        return getattr(prometheus, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
