"""Tiers on disk that end with their test."""

from __future__ import annotations

import pytest

from spectral_paged.store import DiskTier, Folder
from support.disk_records import IDENTITY, SIZE


@pytest.fixture
def disk(tmp_path):
    tiers = []

    def make(max_bytes=100 * SIZE, identity=IDENTITY):
        tiers.append(DiskTier(Folder(tmp_path / "store", max_bytes), identity))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()
