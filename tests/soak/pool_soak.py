"""Random operations on slot pools of many shapes."""

from __future__ import annotations

import random
import time

from spectral_paged.errors import PoolError
from spectral_paged.pool.slot_pool import SlotKind
from support.checked_pool import CheckedPool

PER_POOL = 20_000  # operations before a pool of another shape takes over


def soak_pool(num_operations, seed):
    """(figures, examples of faults) of so many operations, each followed by a check."""
    rng, start = random.Random(seed), time.monotonic()
    row = {"operations": 0, "integrity": 0, "evicted": 0, "moved": 0}
    examples = []
    while row["operations"] < num_operations:
        slots = {SlotKind.EXACT: rng.randint(1, 6), SlotKind.PAGE: rng.randint(1, 4)}
        if rng.random() < 0.1:
            del slots[SlotKind.PAGE]
        checked = CheckedPool(rng.randint(2, 6), slots)
        try:
            for _ in range(min(PER_POOL, num_operations - row["operations"])):
                checked.any_operation(rng)
                row["operations"] += 1
                checked.check()
        except (AssertionError, PoolError) as error:
            row["integrity"] += 1
            row["operations"] += 1
            examples.append(f"{error!r} with {slots}")
        row["evicted"] += checked.pool.num_evicted
        row["moved"] += checked.pool.num_moved
    row["seconds"] = round(time.monotonic() - start)
    return row, examples[:5]
