"""Codec: decomposition against the full SVD on real K and V, purity, bytes, weights, refusals."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from real_text import smollm2_kv

from spectral_paged.codec import (
    attention_mass,
    decode_pages,
    encode_pages,
    gram_basis,
    query_energy,
    randomized_basis,
)
from spectral_paged.errors import FormatError, NonFiniteError
from spectral_paged.kernels.page_view import side_view
from spectral_paged.page_format import PageFormat

H, D = 2, 16
BASES = {
    "gram": gram_basis,
    "randomized": lambda x, rank: randomized_basis(x, rank, seed=5),
}


def fmt(**kw):
    base = {"name": "t", "num_kv_heads": H, "head_dim": D, "k_bands": ((16, 8),),
            "v_bands": ((16, 8),)}  # fmt: skip
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


# ---- decomposition -----------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rank", [8, 16, 32, 48])
@pytest.mark.parametrize("side", ["k", "v"])
def test_truncated_energy_is_within_one_percent_of_the_full_svd(name, rank, side):
    x = getattr(smollm2_kv(), side)[:, :, 64:576].flatten(0, 1)
    x = x - x.mean(-2, keepdim=True)
    basis = BASES[name](x, rank)
    best = torch.linalg.svdvals(x)[:, rank:].square().sum(-1)
    got = (x - (x @ basis.mT) @ basis).square().sum((-1, -2))
    assert float((got / best).max()) < 1.01
    eye = torch.eye(rank).expand(len(x), -1, -1)
    assert torch.allclose(basis @ basis.mT, eye, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rank", [16, D])
def test_the_full_rank_loses_nothing(name, rank):
    x = blocks(1)[0][0]
    assert left_out(x, BASES[name](x, min(rank, D))) < 1e-6 * float(x.square().sum())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_decomposed_in_fp32(name, dtype):
    x = (blocks(1)[0][0] * 50).to(dtype)  # X^T X overflows fp16
    basis = BASES[name](x, 8)
    assert basis.dtype == torch.float32 and bool(torch.isfinite(basis).all())
    best = float(torch.linalg.svdvals(x.float())[:, 8:].square().sum())
    assert left_out(x.float(), basis) < 1.01 * best


# ---- purity ------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposition", ["gram", "randomized"])
@pytest.mark.parametrize("geometry", ["small", "wide"])
@pytest.mark.parametrize("batch", [7, 64])
def test_bytes_do_not_depend_on_the_encoders_batch(decomposition, geometry, batch):
    format = (fmt if geometry == "small" else wide)(decomposition=decomposition)
    k, v = blocks(64, format.head_dim)
    alone = torch.cat([encode_pages(k[i : i + 1], v[i : i + 1], format) for i in range(64)])
    order = torch.randperm(64)
    together = torch.cat(
        [encode_pages(k[i], v[i], format) for i in order.split(batch)]
    )
    assert torch.equal(together, alone[order])


def test_encoding_neither_reads_nor_moves_the_global_random_state():
    format = fmt(decomposition="randomized")
    k, v = blocks(1)
    torch.manual_seed(1)
    first = encode_pages(k, v, format)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(encode_pages(k, v, format), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_layout_of_the_input_changes_no_byte():
    k, v = blocks(3)
    strided = k.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(encode_pages(strided, v, fmt()), encode_pages(k, v, fmt()))


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


def golden_page():
    """One page of two heads, width 16, ranks 16/16, from integers alone.

    head record: K coeff 512x16 | K basis 16x16 | K scale 16 fp32 | K mean 16 fp16 | the same of V
                 0..8191        | 8192..8447    | 8448..8511      | 8512..8543     | 8544..17087
    padded from 17,088 (133.5 units of 128 bytes) to 17,152.
    """
    t, i, d = np.arange(512)[:, None], np.arange(16)[:, None], np.arange(16)[None, :]
    want = np.zeros((2, 2, 512, 16))  # [K|V, head, token, dim]
    page = b""
    for head in range(2):
        record = b""
        for side in range(2):
            coeff = (t * 7 + d * 13 + head * 5 + side * 3) % 256 - 128  # -128..127
            basis = (i * 11 + d * 29 + head * 17 + side) % 256 - 128
            scale = [2.0 ** -(1 + j % 5) for j in range(16)]
            mean = [float(j - 8 + head - 2 * side) for j in range(16)]
            record += (coeff + 128).astype(np.uint8).tobytes()
            record += (basis + 128).astype(np.uint8).tobytes()
            record += struct.pack("<16f", *scale) + struct.pack("<16e", *mean)
            want[side, head] = (coeff * np.array(scale)) @ basis + np.array(mean)
        page += record + b"\0" * (17152 - 17088)
    return page, want


def test_hand_written_bytes_decode_to_hand_computed_keys_and_values():
    page, want = golden_page()
    format = fmt()
    assert len(page) == format.page_bytes == 34304
    got = decode_pages(torch.frombuffer(bytearray(page), dtype=torch.uint8)[None], format)
    for side in range(2):
        assert np.array_equal(got[side][0].double().numpy(), want[side])


def test_views_write_the_golden_bytes():
    page, _ = golden_page()
    format = fmt()
    source = torch.frombuffer(bytearray(page), dtype=torch.uint8)[None]
    target = torch.zeros_like(source)
    for side in ("k", "v"):
        for x, y in zip(side_view(target, format.layout, side),
                        side_view(source, format.layout, side)):  # fmt: skip
            x.copy_(y)
    assert bytes(target[0].tolist()) == page


# ---- round trip --------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e4])
def test_full_rank_pages_err_by_int8_rounding_only(mean, factor):
    k, v = (x * factor for x in blocks(2))
    for x, y in zip(decode_pages(encode_pages(k, v, fmt(mean=mean)), fmt(mean=mean)), (k, v)):
        assert float((x - y).norm() / y.norm()) < 0.01


@pytest.mark.parametrize("value", [0.0, 3.0, -60000.0, 1e6])
def test_constant_blocks_come_back(value):
    k = torch.full((1, H, 512, D), value)
    out, _ = decode_pages(encode_pages(k, k, fmt()), fmt())
    assert torch.allclose(out, k, rtol=0.01)


# ---- weights -----------------------------------------------------------------------------


def test_attention_mass_keeps_what_the_blocks_last_queries_look_at():
    k, v = blocks(1, 64, rank=40)
    queries = torch.randn(1, H, 3, 64, 64) * 2
    weights = attention_mass(queries.flatten(0, 1), k.flatten(0, 1), scale=64**-0.5)
    assert weights.shape == (H, 512) and float(weights.min()) >= 0.1
    assert torch.allclose(weights.mean(-1), torch.ones(H), atol=1e-3)
    errors = {}
    for name in ("none", "attention"):
        format = wide(token_weighting=name)
        out, _ = decode_pages(encode_pages(k, v, format, queries=queries), format)
        errors[name] = float(((out - k).square().sum(-1)[0] * weights).sum())
    assert errors["attention"] < errors["none"]


def test_attention_mass_is_causal_inside_the_block():
    keys = torch.zeros(1, 512, D)
    mass = attention_mass(torch.ones(1, 1, 64, D), keys, scale=1.0)[0]
    assert float(mass[-1]) < float(mass[-64]) <= float(mass[0]) * 1.0001
    assert torch.allclose(mass[:448], mass[0].expand(448))


def test_query_energy_keeps_what_the_queries_see():
    k, v = blocks(1, 64, rank=40)
    queries = torch.randn(1, H, 3, 64, 64) * torch.linspace(4, 0.05, 32).repeat(2)
    weights = query_energy(queries.flatten(0, 1), 64)
    assert torch.equal(weights[:, :32], weights[:, 32:]), "the members of a pair share"
    assert torch.allclose(weights.square().mean(-1), torch.ones(H), atol=1e-3)
    errors = {}
    for name in ("none", "query-energy"):
        format = wide(dim_weighting=name)
        out, _ = decode_pages(encode_pages(k, v, format, queries=queries), format)
        errors[name] = float((queries[0].flatten(1, 2) @ (out - k)[0].mT).norm())
    assert errors["query-energy"] < errors["none"]


def test_weighted_formats_ask_for_queries():
    with pytest.raises(FormatError, match="queries"):
        encode_pages(*blocks(1), fmt(token_weighting="attention"))


# ---- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_is_refused_with_side_block_and_head(bad):
    k, v = blocks(3)
    v[2, 1, 100, 3] = bad
    with pytest.raises(NonFiniteError, match="V has NaN or Inf in block 2, head 1") as caught:
        encode_pages(k, v, fmt())
    assert caught.value.block_index == 2


def test_other_shapes_are_refused_with_both():
    k, v = blocks(1)
    with pytest.raises(FormatError, match="511"):
        encode_pages(k[:, :, :511], v[:, :, :511], fmt())
    with pytest.raises(FormatError, match="v is"):
        encode_pages(k, v[:, :1], fmt())
