"""Pages of every kind: purity, outlier tokens, rotation inside bands, magnitudes, attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given as drawn, settings, strategies as st

from spectral_paged.errors import FormatError
from spectral_paged.kernels.decode.reference import spectral_decode
from spectral_paged.kernels.page.view import side_view, slot_tokens
from spectral_paged.kernels.rebuild.reference import spectral_rebuild
from spectral_paged.pages import PageFormat, decode_pages, encode_pages
from spectral_paged.pages.decompose import orthogonal_mixer, rotate_bands
from spectral_paged.rope import RotaryTable
from support.page_parts import sections, toy_basis, toy_blocks

H, D, LAYERS = 2, 32, 3
ROPE = RotaryTable.from_theta(10000.0, D, max_positions=4096)
LOW = {"k_bands": ((16, 3),), "v_bands": ((16, 4), (16, 2))}
MIXED = {"k_bands": ((16, 8), (16, 3)), "v_bands": ((16, 4), (16, 2)), "gain": True}
KINDS = {
    "int8": {},
    "mixed": MIXED,
    "mixed-post": MIXED | {"rope": "post", "mean": False},
    "small-rows": MIXED | {"basis_bits": 4, "scale_tokens": 64, "band_rotation": True},
    "mixed-frame": MIXED | {"rope": "frame"},
    "shared-frame": LOW
    | {"basis": "shared", "dim_weighting": "calibrated", "rope": "frame", "outlier_slots": 2},
    "slots": MIXED | {"outlier_slots": 5, "mean": False},
    "slots-post": LOW | {"outlier_slots": 7, "rope": "post"},
    "uniform": LOW | {"levels": "uniform", "scale_tokens": 128, "decomposition": "randomized"},
    "shared": LOW | {"basis": "shared", "gain": True},
    "shared-post": LOW | {"basis": "shared", "rope": "post", "outlier_slots": 3},
    "shared-weighted": MIXED
    | {"basis": "shared", "dim_weighting": "calibrated", "band_rotation": True, "mean": False},
    "page-weighted": MIXED | {"dim_weighting": "calibrated", "outlier_slots": 64},
    "page-diagonal": LOW | {"dim_weighting": "diagonal", "rope": "post", "gain": True},
}
CALIBRATION = toy_basis(LAYERS, H, D)


def kind(name, **changes):
    base = PageFormat("t", H, D, ((16, 8),), ((32, 8),))
    return replace(base, **(KINDS[name] | changes))


def calibrated(format, layers):
    """What the codec wants besides K and V, for blocks of `layers`."""
    if not format.needs_calibration:
        return {}
    return {"basis": CALIBRATION.bind(format), "layers": list(layers)}


def round_trip(k, v, format, layers=None):
    given = calibrated(format, [0] * len(k) if layers is None else layers)
    return decode_pages(encode_pages(k, v, format, **given), format, **given)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


# ---- purity ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_bytes_depend_on_the_block_alone(name):
    """Not on the batch, its order, its layers, strides, nor the global random state."""
    format = kind(name)
    k, v = toy_blocks(24, H, D)
    layers = [(5 * i) % LAYERS for i in range(24)]

    def encode(order, sizes):
        pages = [
            encode_pages(k[part], v[part], format, **calibrated(format, [layers[i] for i in part]))
            for part in torch.tensor(order).split(sizes)
        ]
        return torch.cat(pages)

    alone = encode(list(range(24)), 1)
    assert torch.equal(encode(list(range(24)), 24), alone)
    order = torch.randperm(24).tolist()
    state = torch.get_rng_state()
    assert torch.equal(encode(order, 7), alone[order])
    assert torch.equal(torch.get_rng_state(), state)
    strided = [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(encode_pages(*strided, format, **calibrated(format, layers)), alone)


def test_a_layer_of_a_shared_basis_has_bytes_of_its_own():
    format = kind("shared")
    k, v = (x.expand(LAYERS, -1, -1, -1) for x in toy_blocks(1, H, D))
    pages = encode_pages(k, v, format, **calibrated(format, range(LAYERS)))
    assert len({bytes(p.tolist()) for p in pages}) == LAYERS


def test_a_calibrated_format_without_its_basis_is_refused():
    k, v = toy_blocks(2, H, D)
    format = kind("shared")
    basis = CALIBRATION.bind(format)
    pages = encode_pages(k, v, format, basis=basis, layers=[0, 1])
    for given in ({}, {"basis": basis}, {"layers": [0, 1]}, {"basis": basis, "layers": [0]}):
        with pytest.raises(FormatError, match="needs a calibration"):
            encode_pages(k, v, format, **given)
        with pytest.raises(FormatError, match="needs a calibration"):
            decode_pages(pages, format, **given)


# ---- outlier slots -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slots", "slots-post", "shared-post", "page-weighted"])
def test_outlier_tokens_come_back_as_fp16(name):
    format = kind(name)
    k, v = toy_blocks(4, H, D)
    k[:, :, 100] += 50 * torch.randn(D)
    given = calibrated(format, [0, 1, 2, 0])
    pages = encode_pages(k, v, format, **given)
    tokens = slot_tokens(pages, format.layout).long()
    index = tokens.unsqueeze(-1).expand(-1, -1, -1, D)
    for got, want in zip(decode_pages(pages, format, **given), (k, v)):
        assert torch.equal(got.gather(-2, index), want.gather(-2, index).half().float())
        rest = torch.ones(4, H, 512, dtype=torch.bool).scatter(-1, tokens, False)
        assert relative(got[rest], want[rest]) > 1e-3, "other tokens are not stored exactly"


@settings(max_examples=15, deadline=None)
@drawn(
    seed=st.integers(0, 1000),
    slots=st.sampled_from([1, 2, 16, 64]),
    content=st.sampled_from(["noise", "constant", "zero", "one loud token"]),
)
def test_outlier_tokens_ascend_and_never_repeat(seed, slots, content):
    k, v = toy_blocks(2, H, D, seed=seed)
    if content == "constant":
        k, v = k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
    elif content == "zero":
        k, v = torch.zeros_like(k), torch.zeros_like(v)
    elif content == "one loud token":
        k[:, :, seed % 512] *= 1e4
    format = kind("mixed", outlier_slots=slots)
    tokens = slot_tokens(encode_pages(k, v, format), format.layout).long()
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 512
    assert bool((tokens[..., 1:] > tokens[..., :-1]).all())
    if content == "one loud token":
        assert bool((tokens == seed % 512).any(-1).all())


def test_the_worst_tokens_of_keys_and_of_values_share_the_slots():
    """Full rank, so that all error is rounding; loud tokens round worst."""
    k, v = (torch.randn(3, H, 512, D) for _ in "kv")
    worst_k, worst_v = [3, 500], [64, 333]
    k[:, :, worst_k] *= 12
    v[:, :, worst_v] *= 12
    bands = {"k_bands": ((32, 4),), "v_bands": ((32, 4),), "gain": False}
    format = kind("slots", **bands, outlier_slots=4)
    pages = encode_pages(k, v, format)
    want = torch.tensor(sorted(worst_k + worst_v), dtype=torch.int16)
    assert bool((slot_tokens(pages, format.layout) == want).all())
    for got, x in zip(decode_pages(pages, format), (k, v)):
        assert torch.equal(got[:, :, want.long()], x[:, :, want.long()].half().float())


def test_a_silent_component_does_not_choose_the_outliers():
    """K has nothing along some shared rows, whose scales are zero; its loud tokens beat V's."""
    format = kind("shared-post", k_bands=((32, 2),), v_bands=((32, 2),), outlier_slots=2)
    basis = CALIBRATION.bind(format)
    k, v = torch.zeros(1, H, 512, D), torch.randn(1, H, 512, D)
    basis.k.vectors[:] = basis.k.rows[:] = torch.eye(D)
    k[..., :16] = torch.randn(1, H, 512, 16)
    k[:, :, [10, 20]] *= 20
    pages = encode_pages(k, v, replace(format, mean=False), basis=basis, layers=[0])
    got = slot_tokens(pages, replace(format, mean=False).layout)
    assert bool((got == torch.tensor([10, 20], dtype=torch.int16)).all())


def test_slots_leave_the_scales_to_the_other_tokens():
    k, v = toy_blocks(2, H, D)
    loud = k.clone()
    loud[:, :, 50] = 1e4 * torch.sign(torch.randn(D))
    format = kind("shared-post", mean=False, outlier_slots=1)
    given = calibrated(format, [0, 0])
    scales = [
        side_view(encode_pages(x, v, format, **given), format.layout, "k").scale.float()
        for x in (k, loud)
    ]
    assert torch.allclose(*scales, rtol=0.1)
    plain = replace(format, outlier_slots=0)
    assert not torch.allclose(
        side_view(encode_pages(loud, v, plain, **given), plain.layout, "k").scale.float(),
        scales[0],
        rtol=10.0,
    )


# ---- rotation inside bands ---------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 112, 128])
def test_the_mixer_is_orthogonal_and_mixes_everything(size):
    mixer = orthogonal_mixer(size)
    assert torch.allclose(mixer @ mixer.T, torch.eye(size), atol=1e-5)
    assert float(mixer.abs().max()) < 1.5 / size**0.5
    energy = mixer.square() @ torch.cat((torch.ones(size // 2), torch.zeros(size - size // 2)))
    assert torch.allclose(energy, torch.full((size,), 0.5), atol=0.26)


def test_rotated_bands_span_what_they_spanned():
    vectors = torch.linalg.qr(torch.randn(5, 64, 64)).Q
    bands = ((16, 8), (16, 4), (32, 2))
    rotated = rotate_bands(vectors, bands)
    assert torch.equal(rotated[:, :16], vectors[:, :16]), "8-bit bands stay"
    for span in (slice(16, 32), slice(32, 64)):
        a, b = vectors[:, span], rotated[:, span]
        assert torch.allclose(b @ b.mT, torch.eye(b.shape[1]), atol=1e-5)
        assert torch.allclose(a.mT @ a, b.mT @ b, atol=1e-5)
        assert not torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize("name", ["mixed", "small-rows", "shared"])
def test_rotation_changes_meaning_and_no_size(name):
    plain, rotated = kind(name, band_rotation=False), kind(name, band_rotation=True)
    assert plain.page_bytes == rotated.page_bytes and plain.layout == rotated.layout
    assert plain.fingerprint != rotated.fingerprint


def test_rotation_tames_a_component_with_tails():
    """Most of a band's energy in rare events: mixed with the others it is nearly Gaussian."""
    rare = (torch.rand(4, H, 512, 1) < 0.02) * 30.0 * torch.randn(4, H, 512, 1)
    k = torch.randn(4, H, 512, D) + rare * torch.nn.functional.normalize(torch.randn(D), dim=0)
    bands = {"k_bands": ((32, 2),), "v_bands": ((32, 2),), "gain": False}
    plain, rotated = (
        relative(round_trip(k, k, kind("mixed", **bands, band_rotation=r))[0], k)
        for r in (False, True)
    )
    assert rotated < 0.95 * plain


# ---- extremes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [0.0, 3.0, -60000.0])
def test_constant_blocks_come_back_without_nan(name, value):
    k = torch.full((2, H, 512, D), value)
    format = kind(name)
    for got in round_trip(k, -k, format):
        assert bool(torch.isfinite(got).all())
    assert not any(x.any() for x in round_trip(k * 0, k * 0, format))
    if format.mean:
        assert relative(round_trip(k, k, format)[0], k) < 1e-3 if value else True


@pytest.mark.parametrize("name", [n for n in KINDS if "outlier_slots" not in KINDS[n]])
def test_any_magnitude_has_the_same_relative_error(name):
    """At 1e30 squares overflow fp32, at 1e-30 they vanish; fp16 means hold neither."""
    format = kind(name, mean=False)
    k, v = toy_blocks(2, H, D, rank=20)
    want = [relative(x, y) for x, y in zip(round_trip(k, v, format), (k, v))]
    for factor in (1e-30, 1e-8, 1e4, 1e30):
        got = round_trip(k * factor, v * factor, format)
        for x, y, error in zip(got, (k, v), want):
            assert relative(x.double() / factor, y) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("largest", [1e35, 3e38])
def test_a_finite_block_never_turns_into_nan(largest):
    """The sum of 512 finite values need not be finite."""
    k, v = toy_blocks(1, H, D, rank=20)
    k = (k / k.abs().max() + 0.5) * (largest / 2)
    format = kind("mixed", gain=False)
    assert relative(round_trip(k, v, format)[0], k) < 0.5


# ---- attention ---------------------------------------------------------------------------


def attention(q, k, v, scale):
    """fp64: q `[Hq, D]`, k, v `[H, L, D]` -> `[Hq, D]`, lse `[Hq]`."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = (k @ q.double().unsqueeze(-1)).squeeze(-1) * scale
    out = (torch.softmax(scores, -1).unsqueeze(1) @ v).squeeze(1)
    return out.float(), torch.logsumexp(scores, -1).float()


def plane_of(pages, order):
    """A plane of 0xFF with `pages` in scattered places, and their positions."""
    units = pages.shape[1] // 128
    plane = torch.full((len(order) * pages.shape[1],), 0xFF, dtype=torch.uint8)
    positions = torch.tensor(order[: len(pages)], dtype=torch.int32) * units
    for page, at in zip(pages, positions.tolist()):
        plane[at * 128 : (at + units) * 128] = page
    return plane, positions


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_decode_from_pages_is_attention_over_their_contents(name, group):
    """One sequence without pages, one with three, one whose second block is held exactly (-1)."""
    format = kind(name)
    k, v = toy_blocks(5, H, D)
    k[:, :, 7] *= 4
    given = calibrated(format, [1] * 5)
    pages = encode_pages(k, v, format, **given)
    plane, at = plane_of(pages, [4, 0, 6, 2, 5, 1, 3])
    far = 10**6
    table = torch.tensor(
        [[far, far, far, far], [*at[:3].tolist(), far], [int(at[3]), -1, int(at[4]), far]],
        dtype=torch.int32,
    )
    rows = {}
    if format.basis == "shared":
        rows = {"k_basis": given["basis"].k.rows[1], "v_basis": given["basis"].v.rows[1]}
    common = {"layout": format.layout, "first_position": 64, "cos": ROPE.cos, "sin": ROPE.sin}
    q = torch.randn(3, H * group, D)
    out, lse = spectral_decode(
        q, plane, table, torch.tensor([0, 3, 3]), scale=0.3, **common, **rows
    )
    assert not out[0].any() and bool(torch.isneginf(lse[0]).all())
    keys, values = decode_pages(pages, format, **given)
    for i, (blocks, places) in ((1, ([0, 1, 2], [0, 1, 2])), (2, ([3, 4], [0, 2]))):
        spans = torch.cat([torch.arange(512) + 64 + 512 * b for b in places])
        k_seen = keys[blocks].transpose(0, 1).flatten(1, 2)
        if format.rope != "post":
            if format.rope == "frame":
                spans = (spans - 64) // 128 * 128 + 128
            k_seen = ROPE.apply(k_seen.transpose(0, 1), spans).transpose(0, 1)
        v_seen = values[blocks].transpose(0, 1).flatten(1, 2)
        rebuilt = spectral_rebuild(plane, table[i, :3], dtype=torch.float32, **common, **rows)
        assert torch.allclose(rebuilt[0], k_seen, atol=1e-4)
        assert torch.allclose(rebuilt[1], v_seen, atol=1e-5)
        want, want_lse = attention(q[i], k_seen, v_seen, 0.3)
        assert torch.allclose(out[i], want, atol=2e-4, rtol=1e-4)
        assert torch.allclose(lse[i], want_lse, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixed", "shared-post"])
def test_a_sequence_of_blocks_held_exactly_reads_no_page(name):
    format = kind(name)
    plane = torch.full((format.page_bytes,), 0xFF, dtype=torch.uint8)
    rows = {}
    if format.basis == "shared":
        basis = CALIBRATION.bind(format)
        rows = {"k_basis": basis.k.rows[0], "v_basis": basis.v.rows[0]}
    common = {"layout": format.layout, "first_position": 0, "cos": ROPE.cos, "sin": ROPE.sin}
    table = torch.full((1, 4), -1, dtype=torch.int32)
    out, lse = spectral_decode(
        torch.randn(1, 4, D), plane, table, torch.tensor([4]), scale=1.0, **common, **rows
    )
    assert not out.any() and bool(torch.isneginf(lse).all())
    k, v = spectral_rebuild(plane, table[0], dtype=torch.float32, **common, **rows)
    assert k.shape == v.shape == (H, 0, D)


def test_views_of_a_page_share_its_memory():
    format = kind("slots")
    pages = torch.zeros(2, format.page_bytes, dtype=torch.uint8)
    for view in sections(pages, format):
        view.view(torch.uint8).fill_(7)
    assert bool((pages[:, ::128] == 7).all())


@pytest.mark.parametrize("name", ["slots", "mixed"])
def test_a_gain_of_code_zero_marks_the_outlier_tokens_and_no_other(name):
    format = kind(name, gain=True)
    k, v = toy_blocks(3, H, D)
    k[:, :, 100] = v[:, :, 100] = 0.0  # a silent token is no outlier
    pages = encode_pages(k, v, format)
    want = torch.zeros(3, H, 512, dtype=torch.bool)
    if format.outlier_slots:
        want.scatter_(-1, slot_tokens(pages, format.layout).long(), True)
    for side in "kv":
        assert torch.equal(side_view(pages, format.layout, side).gain == 0, want)
