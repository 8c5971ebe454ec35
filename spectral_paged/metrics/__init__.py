"""Figures of a running LLM: snapshots, Prometheus metrics, a live view.

It knows the LLM and what lies below it. Metrics and view need packages of their own, so they are
imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectral_paged.metrics.prometheus import MetricsCollector, serving

__all__ = ["MetricsCollector", "prometheus", "serving", "snapshot", "top"]


def __getattr__(name: str) -> object:
    """What needs `prometheus-client` is imported when it is first asked for."""
    if name in ("MetricsCollector", "serving"):
        from spectral_paged.metrics import prometheus

        return getattr(prometheus, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
