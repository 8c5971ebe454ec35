"""A store waiter makes steps as slow as the store, so that the store has all of their prompts."""

from __future__ import annotations

from spectral_paged.cache.lower_tiers import LowerTiers
from spectral_paged.cache.observer import CacheObserver
from spectral_paged.cache.plan import StepPlan, StepReport
from spectral_paged.cache.sealer import Sealer


class StoreWaiter(CacheObserver):
    """An observer that waits after each step until the store has all that is complete.

    So nothing is dropped, however slow the disk is, and a step is as slow as the disk.
    """

    def __init__(self, sealer: Sealer, lower: LowerTiers) -> None:
        self._sealer = sealer
        self._lower = lower

    def ended(self, plan: StepPlan, report: StepReport) -> None:
        self._sealer.wait()  # blocks with NaN are known then
        self._lower.finish()

    def freed(self, seq_id: str) -> None:
        self._lower.finish()
