"""Keys as pages store them: before RoPE, relative to a frame, or after RoPE."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.kernels.math.rotary import read_keys, rotate, stored_keys, turned_with
from spectral_paged.rope import RotaryTable

D = 32
TABLE = RotaryTable.from_theta(10000.0, D, max_positions=2000)


@pytest.mark.parametrize("rope", ["pre", "frame", "post"])
@pytest.mark.parametrize("first", [0, 64, 1088])
def test_what_is_stored_is_read(rope, first):
    k = torch.randn(2, 512, D)
    rows = TABLE.cos[first : first + 512], TABLE.sin[first : first + 512]
    assert torch.allclose(read_keys(stored_keys(k, *rows, rope), *rows, rope), k, atol=1e-5)


@pytest.mark.parametrize("first", [0, 64, 1088])
def test_a_key_in_its_frame_is_turned_by_its_distance_from_the_middle(first):
    """So the same block gives the same bytes wherever it lies in a sequence."""
    plain = torch.randn(512, D)
    span = slice(first, first + 512)
    keys = rotate(plain, TABLE.cos[span], TABLE.sin[span])
    got = stored_keys(keys, TABLE.cos[span], TABLE.sin[span], "frame")
    angle = torch.atan2(TABLE.sin[1], TABLE.cos[1])
    offset = (torch.arange(512) % 128 - 64).unsqueeze(-1)
    want = rotate(plain, (offset * angle).cos(), (offset * angle).sin())
    assert torch.allclose(got, want, atol=1e-3)


def test_a_query_turned_back_once_scores_a_whole_frame():
    """q R(m) against what is stored is q against the key after RoPE: what kernels rest on."""
    plain, q = torch.randn(512, D), torch.randn(D)
    keys = rotate(plain, TABLE.cos[64:576], TABLE.sin[64:576])
    stored = stored_keys(keys, TABLE.cos[64:576], TABLE.sin[64:576], "frame")
    middles = turned_with(torch.tensor(64), "frame")
    assert middles.tolist() == [64 + 128 * (t // 128) + 64 for t in range(512)]
    turned = rotate(q.expand(512, -1), TABLE.cos[middles], TABLE.sin[middles], inverse=True)
    assert torch.allclose((turned * stored).sum(-1), keys @ q, atol=1e-3)
