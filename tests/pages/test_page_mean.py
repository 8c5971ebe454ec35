"""A page's mean leaves out loud tokens, so that they ruin no other token."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.kernels.page.view import side_view
from spectral_paged.pages import PageFormat, decode_pages, encode_pages
from spectral_paged.pages.page_mean import mean_of, ordinary_tokens
from support.page_parts import toy_basis

D, SLOTS = 64, 4
SHARED = {"basis": "shared", "dim_weighting": "calibrated", "rope": "frame"}
KINDS = {
    "shared": {"k_bands": ((32, 4), (32, 2)), "v_bands": ((64, 3),), **SHARED},
    "page": {"k_bands": ((32, 4), (32, 2)), "v_bands": ((32, 3), (32, 2)), "basis_bits": 4},
}
SIZES = (1, 10, 1_000, 10_000)


def noisy(count=1):
    """K and V with a constant each, as a model's biases give, `[count, 1, 512, D]`."""
    return [torch.randn(count, 1, 512, D) + 3 * torch.randn(1, 1, 1, D) for _ in "kv"]


def ordinary_errors(kind, size, num_loud):
    """Relative errors of K and V over the tokens that are not loud, with and without loudness."""
    format = PageFormat(kind, 1, D, **KINDS[kind], gain=True, band_rotation=True, outlier_slots=4)
    given = {}
    if format.needs_calibration:
        basis = toy_basis(1, 1, D).bind(format)
        format, given = basis.format, {"basis": basis, "layers": [0]}
    rest = torch.randperm(512)[num_loud:].sort().values
    quiet = noisy()
    loud = [size * x.clone() for x in quiet]
    found = []
    for blocks in (loud, quiet):
        for x, y in zip(blocks, quiet):
            x[:, :, rest] = y[:, :, rest]
        pages = encode_pages(*blocks, format, **given)
        out = decode_pages(pages, format, **given)
        found.append(
            [float((x - y)[:, :, rest].norm() / y[:, :, rest].norm()) for x, y in zip(out, quiet)]
        )
    return zip(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_loud", [1, SLOTS])
def test_loud_tokens_in_slots_cost_the_others_nothing(kind, size, num_loud):
    for got, want in ordinary_errors(kind, size, num_loud):
        assert got < 1.03 * want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_loud", [2 * SLOTS, 4 * SLOTS])
def test_more_loud_tokens_than_slots_cost_at_most_their_scales(kind, size, num_loud):
    """Those without a slot decide the scales. From some 1,000x on gains end, at 2 ** -8."""
    for got, want in ordinary_errors(kind, size, num_loud):
        assert got < (2.2 if size <= 1_000 else 12) * want


@pytest.mark.parametrize("num_loud", [0, 1, 5, 30])
@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_the_ordinary_tokens_are_those_that_are_not_loud(num_loud, size):
    x = noisy(3)[0].flatten(0, 1)
    want = torch.ones(3, 512, dtype=torch.bool)
    for row in range(3):
        want[row, torch.randperm(512)[:num_loud]] = False
    x[~want] *= size
    assert torch.equal(ordinary_tokens(x), want)
    assert torch.equal(ordinary_tokens(x * 2.0**-60), want)
    kept = torch.stack([y[w].mean(0) for y, w in zip(x, want)])
    assert torch.allclose(mean_of(x, want), kept, atol=1e-4)


def test_loud_tokens_of_different_sizes_are_all_found():
    """The loudest move the first centre so far that the others look ordinary beside it."""
    x = noisy()[0][0]
    x[:, 5] *= 1e4
    x[:, 50:57] *= 100
    found = (~ordinary_tokens(x)[0]).nonzero().flatten().tolist()
    assert found == [5, *range(50, 57)]


@pytest.mark.parametrize("value", [0.0, 7.0, 1e38])
def test_a_block_of_one_value_has_its_mean(value):
    x = torch.full((1, 512, D), value)
    assert torch.allclose(mean_of(x, ordinary_tokens(x)), x[:, 0], rtol=1e-6)


def test_a_page_without_loud_tokens_has_the_plain_mean_to_the_bit():
    k, v = noisy(4)
    format = PageFormat("t", 1, D, ((32, 4),), ((64, 3),), rope="frame", outlier_slots=SLOTS)
    pages = encode_pages(k, v, format)
    for x, side in ((k, "k"), (v, "v")):
        want = (x / 512).sum(dim=-2).half()
        assert torch.equal(side_view(pages, format.layout, side).mean, want)
