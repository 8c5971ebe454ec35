"""How many cases a test of random ones takes: few in every run, many for `make test-deep`."""

from __future__ import annotations

from hypothesis import settings


def examples(few: int, many: int) -> int:
    """The number of Hypothesis' examples under the profile that this run was started with."""
    return many if settings.get_current_profile_name() == "deep" else few
