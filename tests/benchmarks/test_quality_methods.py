"""Peers round to their number of bits, cost the bytes they claim, and treat each block alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.benchmarks.quality.formats import hadamard_page
from spectral_paged.benchmarks.quality.methods import (
    Calibrated,
    Exact,
    Fp8,
    Kivi,
    PerToken,
    Rotated,
    Sample,
    block_mean,
    hadamard,
    quantized,
)
from spectral_paged.benchmarks.quality.page_methods import SpectralMethod
from spectral_paged.benchmarks.quality.peers import (
    Kvtc,
    Oscar,
    SawInt4,
    TurboQuant,
    lloyd_max,
    peer_methods,
    shared_bits,
)
from spectral_paged.errors import FormatError
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable
from support.tiny_model import tiny_format

ROUNDERS = [PerToken, Kivi, Rotated, lambda bits: Rotated(bits, mean=True)]


def blocks(num=3, heads=2, dim=64, seed=0, bias=0.0):
    """k before RoPE, v, cos and sin of consecutive blocks after 64 landmarks."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(num, heads, 512, dim, generator=g) for _ in range(2))
    k = k + bias * torch.randn(heads, 1, dim, generator=g)
    table = RotaryTable.from_theta(10000.0, dim, max_positions=64 + 512 * num)
    cos, sin = (x[64:].unflatten(0, (num, 1, 512)) for x in (table.cos, table.sin))
    return k, v, cos, sin


def calibrated(method, k, v, cos, sin):
    if isinstance(method, Calibrated):
        k, v = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (k, v))
        cos, sin = (x.flatten(0, 2) for x in (cos, sin))
        q = torch.randn(k.unsqueeze(2).shape, generator=torch.Generator().manual_seed(9))
        method.calibrate(Sample(k, v, q, cos, sin))
    return method


def every_method(head_dim=64):
    format = tiny_format() if head_dim == 16 else None
    return [Exact(), *peer_methods(), *([SpectralMethod(format)] if format else [])]


def mean_square(x, y):
    return float((x - y).square().mean())


# ---- arithmetic --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 16, 64, 128, 256])
def test_hadamard_is_orthonormal_and_its_own_inverse(dim):
    x = torch.randn(5, dim)
    matrix = hadamard(torch.eye(dim))
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, dim**-0.5), atol=1e-6)
    assert torch.allclose(hadamard(x), x @ matrix, atol=1e-5)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 3, 96, 192])
def test_hadamard_refuses_other_widths(dim):
    with pytest.raises(FormatError, match=f"head_dim is {dim}.*power of two"):
        hadamard(torch.zeros(2, dim))


def test_rotated_refuses_a_width_of_96_before_and_at_use():
    with pytest.raises(FormatError, match="power of two"):
        Rotated(4).bytes_per_token(96)
    with pytest.raises(FormatError, match="power of two"):
        Rotated(4).rebuild(0, *blocks(num=1, dim=96))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 8), st.floats(1e-3, 1e3), st.floats(-100, 100), st.integers(0, 99))
def test_a_rounded_value_is_within_half_a_step(bits, spread, offset, seed):
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(seed)) * spread + offset
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # fp16 keeps zero and scale to 2**-11 of themselves; the top level moves by all of them
    slack = (low.abs() + (high - low)) * 2**-10 + 1e-6 * 2**bits
    assert bool(((quantized(x, bits) - x).abs() <= step / 2 + slack).all())


def test_groups_of_one_value_and_of_zeros_come_back():
    x = torch.tensor([[0.0] * 8, [3.5] * 8, [-448.0] * 8])
    assert torch.equal(quantized(x, 3), x)


def test_block_mean_is_the_fp16_mean():
    x = torch.randn(2, 3, 512, 16) + 40
    assert torch.allclose(block_mean(x), x.mean(dim=-2, keepdim=True), rtol=2**-10)
    assert torch.equal(block_mean(x), block_mean(x).half().float())


# ---- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ROUNDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_what_the_bits_predict(build, bits):
    """Uniform rounding leaves step^2 / 12, the step being the group's range over its levels."""
    k, v, cos, sin = blocks()
    method = build(bits)
    new_k, new_v = method.rebuild(0, k, v, cos, sin)

    def predicted(x, kivi_side):
        if isinstance(method, Rotated):
            x = hadamard(x - block_mean(x) if method.mean else x).view_as(x)
        if isinstance(method, Kivi):
            x = x.transpose(-1, -2) if kivi_side == "k" else x
            x = x.unflatten(-1, (-1, 32))
        low, high = x.aminmax(dim=-1)
        return float(((high - low) / (2**bits - 1)).square().mean() / 12)

    before = isinstance(method, Rotated) and method.mean
    # of a group, two values are its ends, without error
    assert mean_square(new_k, rotate(k, cos, sin)) == pytest.approx(
        predicted(k if before else rotate(k, cos, sin), "k"), rel=0.12
    )
    assert mean_square(new_v, v) == pytest.approx(predicted(v, "v"), rel=0.12)


@pytest.mark.parametrize("build", ROUNDERS)
def test_the_error_falls_with_every_bit(build):
    k, v, cos, sin = blocks(num=1)
    errors = [mean_square(build(b).rebuild(0, k, v, cos, sin)[1], v) for b in range(2, 9)]
    for worse, better in zip(errors, errors[1:]):
        assert 3 < worse / better < 10  # (2^(b+1)-1)^2 / (2^b-1)^2: 5.4 at two bits, then 4


def test_fp8_rounds_to_three_bits_of_mantissa():
    k, v, cos, sin = blocks()
    new_k, new_v = Fp8().rebuild(0, k, v, cos, sin)
    for new, x in ((new_k, rotate(k, cos, sin)), (new_v, v)):
        normal = x.abs() > 2**-6
        assert float(((new - x).abs() / x.abs())[normal].max()) <= 2**-4 + 1e-6


def test_fp8_of_unit_scale_clamps_at_448_and_the_calibrated_does_not():
    k, v, cos, sin = blocks(num=1)
    v = v.clone()
    v[0, 0, :2, 0] = torch.tensor([3000.0, -3000.0])
    unit = Fp8().rebuild(0, k, v, cos, sin)[1]
    assert unit[0, 0, :2, 0].tolist() == [448.0, -448.0] and bool(unit.isfinite().all())
    method = calibrated(Fp8(calibrated=True), k, v, cos, sin)
    assert method.rebuild(0, k, v, cos, sin)[1][0, 0, :2, 0].tolist() == [3000.0, -3000.0]
    beyond = method.rebuild(0, k, v * 2, cos, sin)[1]
    assert beyond[0, 0, :2, 0].tolist() == [3000.0, -3000.0]


def test_fp8_refuses_to_guess_a_scale():
    with pytest.raises(FormatError, match=r"layer 0.*Replay\.calibrate"):
        Fp8(calibrated=True).rebuild(0, *blocks(num=1))


def test_mean_removal_saves_biased_keys():
    """A K bias, turned by RoPE, fills every post-RoPE group; before RoPE it is one vector."""
    k, v, cos, sin = blocks(bias=30.0)
    want = rotate(k, cos, sin)
    without, with_mean = (
        mean_square(Rotated(4, mean).rebuild(0, k, v, cos, sin)[0], want) for mean in (False, True)
    )
    assert with_mean < without / 50


def test_kivi_groups_32_tokens_of_a_channel_and_32_channels_of_a_token():
    k, v, cos, sin = blocks(num=1, heads=1)
    flat = (torch.ones_like(cos), torch.zeros_like(sin))
    new_k, new_v = Kivi(2).rebuild(0, k, v, *flat)
    for group in new_k[0, 0].unflatten(0, (-1, 32)).transpose(1, 2).reshape(-1, 32)[:50]:
        assert len(group.unique()) <= 4
    for group in new_v[0, 0].reshape(-1, 32)[:50]:
        assert len(group.unique()) <= 4
    outlier = k.clone()
    outlier[0, 0, 40, 3] = 50.0  # tokens 32..63 of channel 3 suffer, nothing else does
    changed = (Kivi(2).rebuild(0, outlier, v, *flat)[0] != new_k)[0, 0]
    assert set(changed.nonzero()[:, 1].tolist()) == {3}
    assert {32 <= t < 64 for t in changed.nonzero()[:, 0].tolist()} == {True}


# ---- peers of 2025 and 2026 --------------------------------------------------------------


def gaussian_error(levels):
    """The mean square error of rounding N(0, 1) to the nearest of `levels`."""
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    off = (x.unsqueeze(-1) - torch.tensor(levels, dtype=torch.float64)).abs().amin(dim=-1)
    return float((off.square() * torch.exp(-x.square() / 2)).mean() * 18 / (2 * torch.pi) ** 0.5)


@pytest.mark.parametrize(
    "bits, error", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002505)]
)
def test_levels_are_those_of_maxs_table(bits, error):
    levels, borders, found = lloyd_max(bits)
    assert len(levels) == 2**bits and len(borders) == 2**bits - 1
    assert found == pytest.approx(error, rel=2e-3)
    assert gaussian_error(levels.tolist()) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_turboquant_errs_as_lloyd_max_levels_of_unit_vectors_do(bits):
    """Brought to norm 1, codes whose cosine is sqrt(1 - e) err by 2 - 2 sqrt(1 - e)."""
    k, v, cos, sin = blocks(dim=128)
    keys, loud = rotate(k, cos, sin), 7.0
    error = lloyd_max(bits)[2]
    for scale in (1.0, loud):
        new_k, _ = TurboQuant(bits).rebuild(0, k * scale, v, cos, sin)
        got = mean_square(new_k, keys * scale) / float((keys * scale).square().mean())
        assert got == pytest.approx(2 - 2 * (1 - error) ** 0.5, rel=0.05)
        norms = new_k.norm(dim=-1) / (keys * scale).norm(dim=-1)
        assert float((norms - 1).abs().max()) < 2**-10


@pytest.mark.parametrize("build", [TurboQuant, lambda bits: SawInt4()])
def test_values_of_a_token_have_even_levels_between_its_ends(build):
    k, v, cos, sin = blocks()
    _, new_v = build(4).rebuild(0, k, v, cos, sin)
    low, high = v.aminmax(dim=-1)
    want = float(((high - low) / 15).square().mean() / 12)
    assert mean_square(new_v, v) == pytest.approx(want, rel=0.12)


@pytest.mark.parametrize("before", [False, True])
def test_saw_int4_rounds_what_blocks_of_16_components_mix(before):
    k, v, cos, sin = blocks(bias=20.0)
    new_k, _ = SawInt4(before).rebuild(0, k, v, cos, sin)
    keys = k if before else rotate(k, cos, sin)
    mixed = hadamard(keys.unflatten(-1, (-1, 16))).view_as(keys)
    low, high = mixed.aminmax(dim=-1)
    want = float(((high - low) / 15).square().mean() / 12)
    assert mean_square(new_k, rotate(k, cos, sin)) == pytest.approx(want, rel=0.12)


@pytest.mark.parametrize("bits", [2, 3])
def test_kivi_with_groups_of_256_rounds_longer_ranges(bits):
    k, v, cos, sin = blocks()
    new_k, new_v = Kivi(bits, group=256).rebuild(0, k, v, cos, sin)
    keys = rotate(k, cos, sin)
    for new, x, groups in (
        (new_k, keys, keys.transpose(-1, -2).unflatten(-1, (-1, 256))),
        (new_v, v, v),
    ):
        low, high = groups.aminmax(dim=-1)
        want = float(((high - low) / (2**bits - 1)).square().mean() / 12)
        assert mean_square(new, x) == pytest.approx(want, rel=0.12)


def test_oscar_errs_as_four_levels_over_the_clipped_share_do():
    k, v, cos, sin = blocks(dim=128)
    method = calibrated(Oscar(), k, v, cos, sin)
    out = method.rebuild(0, k, v, cos, sin)
    for new, x, share in zip(out, (rotate(k, cos, sin), v), (0.96, 0.92)):
        reach = float(torch.special.ndtri(torch.tensor((1 + share) / 2)))
        levels = [-reach, -reach / 3, reach / 3, reach]
        assert mean_square(new, x) == pytest.approx(gaussian_error(levels), rel=0.05)


def test_oscar_turns_by_what_queries_see():
    """Queries that look one way: every component of a turned key then has its share of that way."""
    k, v, cos, sin = blocks(num=1, heads=1, dim=64)
    flat = (torch.ones_like(cos), torch.zeros_like(sin))
    way = torch.nn.functional.normalize(torch.randn(64), dim=0)
    q = 30 * torch.randn(1, 1, 1, 512, 1) * way + 0.1 * torch.randn(1, 1, 1, 512, 64)
    method = Oscar()
    method.calibrate(Sample(k[:, :, :], v, q, flat[0].flatten(0, 2), flat[1].flatten(0, 2)))
    [basis] = method.bases["k"]
    assert torch.allclose(basis[0] @ basis[0].T, torch.eye(64), atol=1e-5)
    assert torch.allclose((way @ basis[0]).abs(), torch.full((64,), 1 / 8), atol=2e-3)


@pytest.mark.parametrize("bits", [2, 3])
def test_kvtc_errs_as_lloyd_max_levels_where_all_components_are_alike(bits):
    k, v, cos, sin = blocks(num=8, bias=5.0)
    method = calibrated(Kvtc(bits), k, v, cos, sin)
    new_k, new_v = method.rebuild(0, k, v, cos, sin)
    for new, x in ((new_k, rotate(k, cos, sin)), (new_v, v)):
        assert mean_square(new, x) == pytest.approx(lloyd_max(bits)[2], rel=0.06)


def test_kvtc_gives_bits_to_strong_components_and_none_to_silent_ones():
    energy = 4.0 ** -torch.arange(8)
    given = shared_bits(energy, 24)
    assert int(given.sum()) == 24 and bool((given.diff() <= 0).all())
    errors = [lloyd_max(b)[2] if b else 1.0 for b in range(9)]

    def left(bits):
        return sum(float(e) * errors[b] for e, b in zip(energy, bits))

    best = left(given.tolist())
    for a in range(8):
        for b in range(8):
            moved = given.tolist()
            moved[a] += 1
            moved[b] -= 1
            if moved[b] >= 0 and moved[a] <= 8:
                assert best <= left(moved) + 1e-9
    assert shared_bits(torch.tensor([1.0, 0.0, 1.0]), 4).tolist() == [2, 0, 2]


@pytest.mark.parametrize("method", [Oscar(), Kvtc(2)], ids=lambda m: m.name)
def test_a_scheme_that_learns_refuses_to_guess(method):
    with pytest.raises(FormatError, match=r"learnt nothing for layer 0.*Replay\.calibrate"):
        method.rebuild(0, *blocks(num=1))


def test_a_hadamard_page_has_the_presets_bytes_and_rounds_as_its_bits_say():
    format = PageFormat.preset("spectral-quality", num_kv_heads=2, head_dim=64)
    method = hadamard_page(format, 1, torch.device("cpu"))
    assert method.bytes_per_token(64) == SpectralMethod(format).bytes_per_token(64)
    k, v, cos, sin = blocks(num=4)
    new_k, new_v = method.rebuild(0, k, v, cos, sin)
    keys = (lloyd_max(4)[2] + lloyd_max(2)[2]) / 2  # half of the components each
    assert mean_square(new_k, rotate(k, cos, sin)) == pytest.approx(keys, rel=0.1)
    assert mean_square(new_v, v) == pytest.approx(lloyd_max(3)[2], rel=0.1)


# ---- contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64])
def test_a_block_alone_and_in_a_batch_give_the_same_values(dim):
    k, v, cos, sin = blocks(num=5, dim=dim, bias=3.0)
    for method in every_method(dim):
        calibrated(method, k, v, cos, sin)
        together = method.rebuild(0, k, v, cos, sin)
        for i in (0, 3):
            alone = method.rebuild(0, *(x[i : i + 1] for x in (k, v, cos, sin)))
            for a, b in zip(alone, together):
                assert torch.equal(a[0], b[i]), method.name


@pytest.mark.parametrize("dim", [16, 64])
def test_blocks_are_left_as_they_were(dim):
    args = blocks(num=2, dim=dim)
    copies = [x.clone() for x in args]
    for method in every_method(dim):
        new = calibrated(method, *args).rebuild(0, *args)
        assert all(x.dtype == torch.float32 and x.shape == args[0].shape for x in new)
        assert all(torch.equal(x, y) for x, y in zip(args, copies)), method.name


def test_exact_turns_keys_and_leaves_values():
    k, v, cos, sin = blocks()
    new_k, new_v = Exact().rebuild(0, k, v, cos, sin)
    assert torch.equal(new_k, rotate(k, cos, sin)) and torch.equal(new_v, v)


def test_byte_counts_and_ratios():
    """At D = 128 a token's K and V are 512 bytes at 2 bytes an element."""
    sizes = {m.name: m.bytes_per_token(128) for m in [Exact(), *peer_methods()]}
    assert sizes == {
        "exact": 512,
        "fp8-unit": 256,
        "fp8-calibrated": 256,
        "int8": 2 * (128 + 4),
        "int4": 2 * (64 + 4),
        "kivi4": 512 * 5 / 16,
        "kivi3": 128,  # 4 bits an element, 4.0x
        "kivi2": 96,
        "rotated-int4": 136,
        "rotated-int3": 104,
        "rotated-int4-pre-mean": 137,  # 2 x 2 x 128 / 512 bytes of means
        "rotated-int3-pre-mean": 105,
        "kivi3-g256": 48 + 128 * 4 / 256 + 48 + 4,  # codes; 4 bytes a channel of K and 256 tokens,
        "kivi2-g256": 32 + 128 * 4 / 256 + 32 + 4,  # and a token of V
        "saw-int4": 64 + 4 + 64 + 4,
        "saw-int4-pre": 64 + 4 + 64 + 4,
        "turboquant4": 134,  # the slots that vLLM allots: 64 + 2 and 64 + 4 bytes
        "turboquant3": 102,  # 48 + 2 and 48 + 4
        "kvtc3": 2 * (48 + 128 * 2 / 512),  # a deviation in fp16 for 512 tokens of a component
        "kvtc2": 2 * (32 + 128 * 2 / 512),
        "oscar2": 72,  # 2.25 bits an element: 32 + 4 bytes, K and V
    }
    assert Kivi(3).bytes_per_token(16) == 16 * (4 + 5) / 8  # one V group of 16
    assert Kivi(3, group=256).bytes_per_token(64) == 24 + 1 + 24 + 4  # one V group of 64
    assert TurboQuant(3).bytes_per_token(64) == 24 + 2 + 24 + 4
    assert Oscar().bytes_per_token(64) == 2 * (16 + 4)
    assert Oscar().bytes_per_token(256) == 2 * (64 + 2 * 4)  # two groups of 128
    format = tiny_format()
    assert SpectralMethod(format).bytes_per_token(16) == format.page_bytes / 1024


def test_names_are_unique_and_landmarks_are_passed_on():
    methods = peer_methods(num_landmark_tokens=0)
    assert len({m.name for m in methods}) == len(methods)
    assert {m.num_landmark_tokens for m in methods} == {0}
    assert {m.num_landmark_tokens for m in peer_methods()} == {64}
