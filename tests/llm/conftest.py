"""What tests of an LLM share."""

from __future__ import annotations

import pytest

from spectral_paged.cache import build


@pytest.fixture(scope="module", autouse=True)
def _little_memory_to_pass_through():
    """Poisoning takes a second a GiB, and every cache over a folder would have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PASSING_BYTES", 64 << 20)
        yield
