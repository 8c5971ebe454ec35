"""The codec: decomposition against the full SVD on real K and V, purity, bytes and refusals."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

from spectral_paged.errors import FormatError, NonFiniteError
from spectral_paged.kernels.page.view import side_view
from spectral_paged.kernels.seal.eigenvectors import eigenvectors
from spectral_paged.pages import PageFormat, decode_pages, encode_pages
from spectral_paged.pages.decompose import gram_basis, randomized_basis
from support.page_parts import sections, toy_basis
from support.real_text import smollm2_kv

H, D = 2, 16
BASES = {
    "gram": lambda x, rank: gram_basis(x, rank, eigenvectors),
    "randomized": lambda x, rank: randomized_basis(x, rank, seed=5),
}


def fmt(**kw):
    base = {
        "name": "t",
        "num_kv_heads": H,
        "head_dim": D,
        "k_bands": ((16, 8),),
        "v_bands": ((16, 8),),
    }
    return PageFormat(**(base | kw))


def wide(**kw):
    return fmt(**({"head_dim": 64, "k_bands": ((16, 8),), "v_bands": ((32, 8),)} | kw))


def blocks(count, dim=D, seed=0, rank=6):
    """Low-rank blocks with noise and an offset, [count, H, 512, dim] twice."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(2, count, H, 512, rank, generator=g)
    x = low @ torch.randn(2, count, H, rank, dim, generator=g)
    x = x + 0.1 * torch.randn(x.shape, generator=g) + torch.randn(2, count, H, 1, dim, generator=g)
    return x[0], x[1]


def left_out(x, basis):
    return float((x - (x @ basis.mT) @ basis).square().sum())


def real(side):
    """One real block of every layer and head, mean removed, [90, 512, 64]."""
    x = getattr(smollm2_kv(), side)[:, :, 64:576].flatten(0, 1)
    return x - x.mean(-2, keepdim=True)


def is_orthonormal(basis):
    return torch.allclose(basis @ basis.mT, torch.eye(basis.shape[-2]), atol=1e-4)


# ---- decomposition -----------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rank", [8, 16, 32, 48])
@pytest.mark.parametrize("side", ["k", "v"])
def test_truncated_energy_is_within_one_percent_of_the_full_svd(name, rank, side):
    x = real(side)
    basis = BASES[name](x, rank)
    best = torch.linalg.svdvals(x)[:, rank:].square().sum(-1)
    got = (x - (x @ basis.mT) @ basis).square().sum((-1, -2))
    assert float((got / best).max()) < 1.01
    assert is_orthonormal(basis)
    energy = (x @ basis.mT).square().sum(-2)
    assert bool((energy[:, 1:] <= 1.001 * energy[:, :-1]).all()), "strongest component first"


@pytest.mark.model
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("side", ["k", "v"])
def test_the_full_rank_loses_nothing(name, side):
    x = real(side)
    basis = BASES[name](x, 64)
    assert basis.shape == (len(x), 64, 64) and is_orthonormal(basis)
    assert left_out(x, basis) < 1e-9 * float(x.square().sum())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_decomposed_in_fp32(name, dtype):
    x = (blocks(1)[0][0] * 50).to(dtype)  # X^T X overflows fp16
    basis = BASES[name](x, 8)
    assert basis.dtype == torch.float32 and is_orthonormal(basis)
    best = float(torch.linalg.svdvals(x.float())[:, 8:].square().sum())
    assert left_out(x.float(), basis) < 1.01 * best


# ---- purity ------------------------------------------------------------------------------


PURE = [("gram", False), ("randomized", False), ("gram", True)]


def weights_of(count, is_weighted):
    """Weights of the tokens of `count` blocks, or none."""
    return torch.rand(count, H, 512) + 0.1 if is_weighted else None


@pytest.mark.parametrize("decomposition, is_weighted", PURE)
@pytest.mark.parametrize("geometry", ["small", "wide"])
@pytest.mark.parametrize("batch", [7, 64])
def test_bytes_do_not_depend_on_the_encoders_batch(decomposition, is_weighted, geometry, batch):
    format = (fmt if geometry == "small" else wide)(decomposition=decomposition)
    k, v = blocks(64, format.head_dim)
    w = weights_of(64, is_weighted)
    order = torch.randperm(64)

    def encode(places):
        weights = [None if w is None else w[i] for i in places]
        return torch.cat(
            [encode_pages(k[i], v[i], format, token_weights=x) for i, x in zip(places, weights)]
        )

    assert torch.equal(encode(order.split(batch)), encode(torch.arange(64).split(1))[order])


@pytest.mark.parametrize("decomposition, is_weighted", PURE)
def test_encoding_neither_reads_nor_moves_the_global_random_state(decomposition, is_weighted):
    format = fmt(decomposition=decomposition)
    k, v = blocks(1)
    w = weights_of(1, is_weighted)
    torch.manual_seed(1)
    first = encode_pages(k, v, format, token_weights=w)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(encode_pages(k, v, format, token_weights=w), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 3, 0)])
def test_memory_layout_of_the_input_changes_no_byte(axes):
    """Sums over other strides round differently; one fp16 mean in a few hundred would show it."""
    k = torch.randn(128, H, 512, D) * 3 + 1
    strided = k.permute(axes).contiguous().permute([axes.index(i) for i in range(4)])
    assert not strided.is_contiguous()
    assert torch.equal(encode_pages(strided, strided, fmt()), encode_pages(k, k, fmt()))


def test_a_vectors_sign_is_fixed_by_its_largest_entry():
    for decomposition in ("gram", "randomized"):
        pages = encode_pages(*blocks(4), fmt(decomposition=decomposition))
        for side in ("k", "v"):
            [band] = side_view(pages, fmt().layout, side).bands
            assert bool((band.basis.amax(-1) == 255).all())


def test_pages_are_position_independent():
    """The same block anywhere has the same bytes, and a page means the same wherever it lies."""
    k, v = blocks(4)
    k[3], v[3] = k[0], v[0]
    pages = encode_pages(k, v, fmt())
    assert torch.equal(pages[3], pages[0])
    moved = torch.cat((pages[2:], pages[:2]))
    for x, y in zip(decode_pages(moved, fmt()), decode_pages(pages, fmt())):
        assert torch.equal(x[2:], y[:2])


# ---- bytes -------------------------------------------------------------------------------


def bf16(values):
    """Bytes of bf16 numbers: the upper half of their fp32 patterns (all must fit)."""
    bits = np.array(values, "<f4").view("<u4")
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2").tobytes()


def from_bf16(data):
    return (np.frombuffer(data.tobytes(), "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)


def golden_page():
    """One page of two heads, width 16, ranks 16/16, from integers alone.

    head record: K codes 512x16 | K basis 16x16 | K scale 16 bf16 | K mean 16 fp16 | the same of V
                 0..8191        | 8192..8447    | 8448..8479      | 8480..8511     | 8512..17023
    17,024 bytes are 133 units of 128: no padding. V's codes: 4 tiles x 16 components x 128 tokens.
    """
    t, i, d = np.arange(512)[:, None], np.arange(16)[:, None], np.arange(16)[None, :]
    want = np.zeros((2, 2, 512, 16))  # [K|V, head, token, dim]
    page = b""
    for head in range(2):
        for side in range(2):
            coeff = (t * 7 + d * 13 + head * 5 + side * 3) % 256 - 128  # -128..127
            basis = (i * 11 + d * 29 + head * 17 + side) % 256 - 128
            scale = [2.0 ** -(1 + j % 5) for j in range(16)]
            mean = [float(j - 8 + head - 2 * side) for j in range(16)]
            stored = coeff if side == 0 else coeff.reshape(4, 128, 16).transpose(0, 2, 1)
            page += (stored + 128).astype(np.uint8).tobytes()
            page += (basis + 128).astype(np.uint8).tobytes()
            page += bf16(scale) + struct.pack("<16e", *mean)
            want[side, head] = (coeff * np.array(scale)) @ basis + np.array(mean)
    return page, want


def test_hand_written_bytes_decode_to_hand_computed_keys_and_values():
    page, want = golden_page()
    format = fmt()
    assert len(page) == format.page_bytes == 34048
    got = decode_pages(torch.frombuffer(bytearray(page), dtype=torch.uint8)[None], format)
    for side in range(2):
        assert np.array_equal(got[side][0].double().numpy(), want[side])


def test_views_write_the_golden_bytes():
    page, _ = golden_page()
    format = fmt()
    source = torch.frombuffer(bytearray(page), dtype=torch.uint8)[None]
    target = torch.zeros_like(source)
    for x, y in zip(sections(target, format), sections(source, format)):
        x.copy_(y)
    assert bytes(target[0].tolist()) == page


def test_encode_writes_where_the_drawing_says():
    """Every section of a fresh page, read at literal offsets, rebuilds the block."""
    k, v = blocks(1)
    page = encode_pages(k, v, fmt())[0].numpy()
    for head in range(2):
        record = page[head * 17024 : (head + 1) * 17024]
        for x, start in ((k, 0), (v, 8512)):
            side = record[start : start + 8512]
            coeff = side[:8192].reshape(512, 16)
            if start:  # V: tiles of 128 tokens, component by component
                coeff = side[:8192].reshape(4, 16, 128).transpose(0, 2, 1).reshape(512, 16)
            coeff = coeff.astype(np.float64) - 128
            basis = side[8192:8448].reshape(16, 16).astype(np.float64) - 128
            scale = from_bf16(side[8448:8480])
            mean = np.frombuffer(side[8480:].tobytes(), "<f2").astype(np.float64)
            want = x[0, head].double().numpy()
            assert np.allclose(mean, want.mean(0), atol=2e-3)
            got = (coeff * scale) @ basis + mean
            assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


# ---- round trip --------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("factor", [1e-30, 1e-8, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("decomposition", ["gram", "randomized"])
def test_full_rank_pages_err_by_int8_rounding_only(mean, factor, decomposition):
    """At 1e30 (finite in bf16) squares overflow fp32, at 1e-30 they vanish."""
    format = fmt(mean=mean, decomposition=decomposition)
    k, v = (x * factor for x in blocks(2))
    for x, y in zip(decode_pages(encode_pages(k, v, format), format), (k, v)):
        assert float((x.double() - y.double()).norm() / y.double().norm()) < 0.01


@pytest.mark.parametrize("exponent", [-90, -20, 20, 90])
def test_a_power_of_two_changes_the_scales_only(exponent):
    """Whatever the magnitude, a truncated page keeps the same components."""
    k, v = blocks(2, 64, rank=40)
    format = wide(mean=False)
    plain, scaled = (encode_pages(k * f, v * f, format) for f in (1.0, 2.0**exponent))
    for side in ("k", "v"):
        x, y = (side_view(p, format.layout, side) for p in (plain, scaled))
        [a], [b] = x.bands, y.bands
        assert torch.equal(a.plane, b.plane) and torch.equal(a.basis, b.basis)
        assert torch.equal(x.scale.float() * 2.0**exponent, y.scale.float())


@pytest.mark.parametrize("mean", [True, False])
def test_a_large_block_beside_a_small_one_costs_it_nothing(mean):
    """Scales are per head and component, so one loud head does not coarsen a quiet one."""
    k, _ = blocks(1)
    k[:, 1] *= 6e4 / float(k[:, 1].abs().max())
    out, _ = decode_pages(encode_pages(k, k, fmt(mean=mean)), fmt(mean=mean))
    for head in range(2):
        assert float((out - k)[:, head].norm() / k[:, head].norm()) < 0.01


@pytest.mark.parametrize("value", [0.0, 3.0, -60000.0, 1e6])
def test_constant_blocks_come_back(value):
    k = torch.full((1, H, 512, D), value)
    out, _ = decode_pages(encode_pages(k, k, fmt()), fmt())
    assert torch.allclose(out, k, rtol=0.01)


def test_a_block_of_nothing_has_codes_of_nothing():
    """0 / 0 would be NaN, and which integer that becomes is the hardware's choice."""
    zero = torch.zeros(1, H, 512, D)
    for mean in (True, False):
        page = encode_pages(zero, zero, fmt(mean=mean))
        view = side_view(page, fmt(mean=mean).layout, "k")
        assert bool((view.bands[0].plane == 128).all()) and not view.scale.any()


# ---- weights -----------------------------------------------------------------------------


def test_weighted_tokens_are_kept_better():
    k, v = blocks(1, 64, rank=40)
    loud = torch.rand(1, H, 512, generator=torch.Generator().manual_seed(1)) < 0.1
    weights = torch.where(loud, 20.0, 0.1)
    errors = []
    for given in (None, weights):
        out = decode_pages(encode_pages(k, v, wide(), token_weights=given), wide())
        errors.append(
            [float(((x - y).square().sum(-1) * weights).sum()) for x, y in zip(out, (k, v))]
        )
    assert all(b < 0.8 * a for a, b in zip(*errors))


@pytest.mark.parametrize("weighting", ["diagonal", "calibrated"])
def test_calibrated_weights_keep_what_the_queries_see(weighting):
    k, v = blocks(1, 64, rank=40)
    loud = torch.linspace(4, 0.05, 32).repeat(2)
    if weighting == "calibrated":  # energies along directions that are no dimensions
        loud = loud * torch.linalg.qr(torch.randn(64, 64)).Q.mT
    queries = torch.randn(H, 192, 64)
    queries = queries @ loud.mT if loud.dim() == 2 else queries * loud
    calibration = toy_basis(1, H, 64, q=(queries.mT @ queries)[None])
    errors = {}
    for name in ("none", weighting):
        format = wide(dim_weighting=name)
        given = {"basis": calibration.bind(format), "layers": [0]} if name != "none" else {}
        out, _ = decode_pages(encode_pages(k, v, format, **given), format, **given)
        errors[name] = (queries @ (out - k)[0].mT).norm()
    assert float(errors[weighting]) < 0.9 * float(errors["none"])
    # at the root of the metric itself, no 16 components do better
    format = wide(dim_weighting=weighting)
    bound = calibration.bind(format)
    out, _ = decode_pages(
        encode_pages(k, v, format, basis=bound, layers=[0]), format, basis=bound, layers=[0]
    )
    weight = bound.k.weight[0]
    best = torch.linalg.svdvals((k - k.mean(-2, keepdim=True)) @ weight)[..., 16:].square().sum()
    assert float(((k - out) @ weight).square().sum()) < 1.01 * float(best)


def test_equal_weights_weigh_nothing():
    k, v = blocks(2)
    plain = encode_pages(k, v, fmt())
    assert torch.equal(encode_pages(k, v, fmt(), token_weights=torch.ones(2, H, 512)), plain)


# ---- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["K", "V", "token_weights"])
def test_non_finite_input_is_refused_with_side_block_and_head(side, bad):
    k, v = blocks(3)
    weights = torch.ones(3, H, 512)
    {"K": k, "V": v, "token_weights": weights}[side][2, 1, 2] = bad
    with pytest.raises(NonFiniteError, match=f"{side} has NaN or Inf in block 2, head 1") as caught:
        encode_pages(k, v, fmt(), token_weights=weights)
    assert caught.value.block_index == 2


def test_weights_that_fit_no_block_or_no_format_are_refused():
    k, v = blocks(2)
    for shape in ((1, H, 512), (2, 512), (2, H, 511)):
        with pytest.raises(FormatError, match=r"token_weights are .* take \[2, 2, 512\]"):
            encode_pages(k, v, fmt(), token_weights=torch.ones(shape))
    with pytest.raises(FormatError, match="negative"):
        encode_pages(k, v, fmt(), token_weights=-torch.ones(2, H, 512))
    bound = toy_basis(1, H, D).bind(fmt(basis="shared"))
    given = {"basis": bound, "layers": [0, 0]}
    with pytest.raises(FormatError, match="a page's own basis; format 't' shares one"):
        encode_pages(k, v, bound.format, token_weights=torch.ones(2, H, 512), **given)


@pytest.mark.parametrize("shape", [(1, H, 511, D), (1, H + 1, 512, D), (1, H, 512, 8), (H, 512, D)])
def test_other_shapes_are_refused_with_both(shape):
    x = torch.zeros(shape)
    with pytest.raises(FormatError, match=re.escape(f"blocks are {list(shape)}; ")):
        encode_pages(x, x, fmt())


def test_keys_and_values_of_different_shapes_are_refused():
    k, v = blocks(1)
    with pytest.raises(FormatError, match="v is"):
        encode_pages(k, v[:, :1], fmt())
