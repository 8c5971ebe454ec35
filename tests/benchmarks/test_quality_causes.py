"""Variants that tell sides, bands and scales apart change just that, and no byte count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectral_paged.benchmarks.quality.causes import OnePart, Rescaled
from spectral_paged.benchmarks.quality.page_methods import SpectralMethod
from spectral_paged.kernels.math.rotary import rotate, stored_keys
from spectral_paged.kernels.page.view import side_view
from spectral_paged.pages import PageFormat, encode_pages
from spectral_paged.rope import RotaryTable
from support.page_parts import toy_basis, toy_blocks

D, H = 64, 2
LAYERS = [0, 1, 1]


def bound(name="spectral-compact", **changes):
    format = PageFormat.preset(name, num_kv_heads=H, head_dim=D)
    return toy_basis(2, H, D).bind(replace(format, **changes))


def blocks():
    k, v = toy_blocks(3, H, D, rank=24)
    k[:, :, 9] *= 30
    table = RotaryTable.from_theta(10000.0, D, max_positions=64 + 512 * 3)
    cos, sin = (x[64:].unflatten(0, (3, 1, 512)) for x in (table.cos, table.sin))
    return k, v, cos, sin


def errors(method, args):
    """What `method` adds to the keys after RoPE and to the values of blocks of two layers."""
    k, v, cos, sin = args
    new_k, new_v = method.rebuild_layers(LAYERS, *args)
    return new_k - rotate(k, cos, sin), new_v - v


@pytest.mark.parametrize("side", ["k", "v"])
def test_a_side_alone_has_the_errors_of_the_page_and_the_other_side_none(side):
    basis, args = bound(), blocks()
    want = errors(SpectralMethod(basis.format, basis), args)
    got = errors(OnePart(basis.format, basis, label="x", side=side), args)
    here, there = (0, 1) if side == "k" else (1, 0)
    assert torch.equal(got[here], want[here])
    assert float(got[there].abs().max()) < 1e-4
    assert float(want[there].abs().max()) > 1e-2


@pytest.mark.parametrize("k_bands", [((32, 4), (32, 2)), ((32, 4), (16, 2))])
def test_the_errors_of_all_bands_add_up_to_those_of_the_side(k_bands):
    basis, args = bound(k_bands=k_bands), blocks()
    whole, _ = errors(OnePart(basis.format, basis, label="x", side="k"), args)
    parts = [0, 1] + [-1] * (sum(n for n, _ in k_bands) < D)
    found = [errors(OnePart(basis.format, basis, label="x", band=i), args)[0] for i in parts]
    assert float((sum(found) - whole).norm() / whole.norm()) < 2e-3
    assert all(float(x.norm()) > 1e-2 for x in found)


def coefficients(basis, pages, keys, v, side):
    """Given and stored coefficients of tokens that are not in slots, `[N, H, 512, rank]`."""
    view = side_view(pages, basis.format.layout, side)
    x = (keys if side == "k" else v) - view.mean.float().unsqueeze(-2)
    kept = (view.gain != 0).unsqueeze(-1)
    return (
        (x @ basis.projections(LAYERS)[f"{side}_projection"]) * kept,
        view.coefficients() * kept,
    )


@pytest.mark.parametrize("band", [None, 1])
@pytest.mark.parametrize("rule", ["unbiased", "norm"])
@pytest.mark.parametrize("sides", ["k", "v", "kv"])
def test_rescaled_pages_keep_mean_products_or_norms_and_nothing_else_changes(rule, sides, band):
    basis = bound(v_bands=((32, 3), (32, 2)))
    k, v, cos, sin = blocks()
    keys = stored_keys(rotate(k, cos, sin), cos, sin, basis.format.rope)
    plain = encode_pages(keys, v, basis.format, basis=basis, layers=LAYERS)
    pages = plain.clone()
    method = Rescaled(basis.format, basis, "spectral", "x", rule, sides, band)
    method.change(pages, {"k": keys, "v": v}, LAYERS)
    chosen = slice(0 if band is None else 32, D)
    for side in "kv":
        x, stored = coefficients(basis, pages, keys, v, side)
        before = coefficients(basis, plain, keys, v, side)[1]
        if side not in sides:
            assert torch.equal(stored, before)
            continue
        assert torch.equal(stored[..., : chosen.start], before[..., : chosen.start])
        both = x if rule == "unbiased" else stored
        got, want = ((a * b).sum(-2)[..., chosen] for a, b in ((stored, both), (x, x)))
        assert torch.allclose(got, want, rtol=2**-7)  # scales are bf16
        sizes = [float(y.norm(dim=-2)[..., chosen].mean()) for y in (before, stored)]
        assert sizes[0] < 0.99 * sizes[1], "least squares shrinks"
    for side in sides:
        changed, was = (side_view(p, basis.format.layout, side).scale for p in (pages, plain))
        changed.copy_(was)
    assert torch.equal(pages, plain), "scales alone may change"


def test_no_variant_has_more_bytes_and_each_has_a_name_and_a_key_of_its_own():
    basis = bound()
    base = SpectralMethod(basis.format, basis)
    rows = [
        OnePart(basis.format, basis, label="K alone"),
        OnePart(basis.format, basis, label="V alone", side="v"),
        Rescaled(basis.format, basis, label="norm K", rule="norm"),
    ]
    assert {m.bytes_per_token(D) for m in rows} == {base.bytes_per_token(D)}
    assert len({m.name for m in [base, *rows]}) == len({m.fingerprint for m in [base, *rows]}) == 4
