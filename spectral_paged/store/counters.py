"""The counters of a tier: records written, read, evicted, dropped, and failures."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from spectral_paged.errors import shown

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TierCounters:
    """A tier's totals since its construction.

    Attributes:
        dropped: records that were not written, because the tier had other things to do.
        failed: reads and writes that raised.
    """

    written: int = 0
    written_bytes: int = 0
    read: int = 0
    read_bytes: int = 0
    evicted: int = 0
    dropped: int = 0
    failed: int = 0
    _told: set[str] = field(default_factory=set)

    def stats(self) -> dict[str, int]:
        """The totals that a cache's `stats` shows."""
        return {
            "written_bytes": self.written_bytes,
            "read_bytes": self.read_bytes,
            "evicted_records": self.evicted,
            "dropped_records": self.dropped,
            "failures": self.failed,
        }

    def count_failure(self, what: str, error: BaseException, *, where: str = "") -> None:
        """Count a read or write that failed; the log tells of each kind once.

        Args:
            where: the one file of many that it was; it is told, and makes no kind of its own.
        """
        self.failed += 1
        kind = f"{what}: {type(error).__name__}"
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(
                "%s failed: %s%s. What it held is computed again; further failures of this kind "
                "are only counted",
                what,
                where and f"{where}: ",
                shown(error),
                extra={"event": "store_failure"},
            )
