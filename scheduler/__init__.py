"""Continuous batching over ids and counts, without torch; the cache comes as an argument."""

from spectral_paged.scheduler.request import PreemptionReason, Request, RequestStatus
from spectral_paged.scheduler.scheduler import Scheduler, SchedulerConfig, SchedulerOutput

__all__ = [
    "PreemptionReason",
    "Request",
    "RequestStatus",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
]
