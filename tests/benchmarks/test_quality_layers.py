"""Errors by layer and head, spectra, and methods that need more than a block's K and V."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from spectral_paged.benchmarks.quality.layers import attention_errors, reconstruction_errors
from spectral_paged.benchmarks.quality.methods import Exact, Kivi
from spectral_paged.benchmarks.quality.needle_tokens import errors, synthetic
from spectral_paged.benchmarks.quality.page_methods import (
    OnlineMethod,
    SpectralMethod,
    WeightedMethod,
    attention_mass,
)
from spectral_paged.benchmarks.quality.replay import Replay
from spectral_paged.benchmarks.quality.spectra import decay
from spectral_paged.errors import FormatError, InvalidRequestError
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import decode_pages, encode_pages
from support.tiny_model import random_prompts, tiny_format, tiny_model

IDS = random_prompts([1300], seed=5)[0]
WEIGHTED = replace(tiny_format(), name="weighted")


@functools.cache
def replay():
    model = tiny_model()
    return Replay(LoadedModel("tiny", model, None, ModelGeometry.from_config(model.config)))


@functools.cache
def context():
    return replay().prefill(IDS, keep_queries=True)


def test_queries_are_kept_as_the_model_made_them():
    """Scores of the kept queries and keys give back the first layer's values-weighted output."""
    assert replay().prefill(IDS[:100]).q is None
    assert context().q.shape == (2, 4, 1300, 16)
    seen = {}

    def keep(module, args, output):
        seen["q"] = output.view(1, 1300, 4, 16).transpose(1, 2)[0]

    handle = replay().model.model.layers[0].self_attn.q_proj.register_forward_hook(keep)
    replay().model.model(torch.tensor([IDS]), use_cache=False, replay_pass=_whole())
    handle.remove()
    blocks = replay().blocks(context(), 0, 64, 1088)
    want = seen["q"][:, 64:1088].unflatten(0, (2, 2)).unflatten(2, (2, 512)).permute(2, 0, 1, 3, 4)
    cos, sin = (x.unsqueeze(1) for x in (blocks.cos, blocks.sin))
    torch.testing.assert_close(rotate(want, cos, sin), blocks.q, atol=1e-4, rtol=1e-4)


def _whole():
    from spectral_paged.benchmarks.quality.shared_attention import Pass

    return Pass(context().k, context().v, 0)


def test_a_weighted_format_gets_its_blocks_last_queries():
    sealed = replay().seal(context(), WeightedMethod(WEIGHTED))
    assert sealed.num_sealed == 2
    blocks = replay().blocks(context(), 1, 64, 1088)
    keys = rotate(blocks.k, blocks.cos, blocks.sin)
    mass = attention_mass(blocks.q[..., -64:, :].flatten(0, 1), keys.flatten(0, 1), scale=16**-0.5)
    weights = mass.unflatten(0, keys.shape[:2])
    pages = encode_pages(blocks.k, blocks.v, WEIGHTED, token_weights=weights)
    _, v = decode_pages(pages, WEIGHTED)
    got = sealed.v[1, :, 64:1088].unflatten(1, (2, 512)).transpose(0, 1)
    torch.testing.assert_close(got, v)
    _, plain = decode_pages(encode_pages(blocks.k, blocks.v, WEIGHTED), WEIGHTED)
    assert not torch.allclose(got, plain)
    assert WeightedMethod(WEIGHTED).fingerprint != SpectralMethod(WEIGHTED).fingerprint


def test_a_weighted_format_without_queries_is_refused():
    with pytest.raises(InvalidRequestError, match="keep_queries"):
        replay().seal(replay().prefill(IDS), WeightedMethod(WEIGHTED))
    with pytest.raises(FormatError, match="queries"):
        WeightedMethod(WEIGHTED).rebuild(0, *[torch.zeros(1)] * 4)


def test_prefill_over_pages_keeps_the_queries_a_weighted_format_needs():
    sealed = replay().prefill_through(IDS, WeightedMethod(WEIGHTED), 512)
    assert sealed.num_sealed == 2 and bool(torch.isfinite(sealed.k).all())


@pytest.mark.parametrize("hot, blocks", [(0, 2), (64, 2), (128, 2), (256, 1)])
def test_the_hot_window_is_never_sealed(hot, blocks):
    method = Kivi(2, hot_tokens=hot)
    exact = replay().prefill(IDS[: 64 + 1024 + 128])
    sealed = replay().seal(exact, method)
    assert sealed.num_sealed == blocks
    end = 64 + 512 * blocks
    assert torch.equal(sealed.k[:, :, end:], exact.k[:, :, end:])
    assert not torch.equal(sealed.k[:, :, end - 512 : end], exact.k[:, :, end - 512 : end])


def test_an_online_basis_is_that_of_the_first_block():
    format = replace(tiny_format(), name="online", basis="shared")
    blocks = replay().blocks(context(), 0, 64, 1088)
    parts = (blocks.k, blocks.v, blocks.cos, blocks.sin)
    k, v = OnlineMethod(format).rebuild(0, *parts)
    first = OnlineMethod(format).rebuild(0, *(x[:1] for x in parts))
    torch.testing.assert_close(k[:1], first[0])
    alone = OnlineMethod(format).rebuild(0, *(x[1:] for x in parts))
    assert not torch.allclose(v[1:], alone[1], atol=1e-4)
    own = SpectralMethod(tiny_format()).rebuild(0, *(x[1:] for x in parts))
    assert (own[1] - blocks.v[1:]).norm() < (v[1:] - blocks.v[1:]).norm() * 1.05


def test_exact_blocks_have_no_error_and_coarser_ones_more():
    exact, fine, coarse = (
        reconstruction_errors(replay(), m, context()) for m in (Exact(), Kivi(4), Kivi(2))
    )
    for key in ("k", "v", "attention"):
        a, b, c = (torch.tensor(e[key]) for e in (exact, fine, coarse))
        assert bool((a < 1e-5).all() and (a < b).all() and (b < c).all()), key
    assert torch.tensor(fine["attention"]).shape == (2, 4)


def test_attention_errors_are_those_of_the_definition():
    g = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 3, 5, 8, generator=g)
    k, v, new_v = (torch.randn(1, 2, 512, 8, generator=g) for _ in range(3))
    got = attention_errors(q, (k, v), (k, new_v), 0.3)
    for h in range(2):
        for i in range(3):
            weights = torch.softmax(q[0, h, i] @ k[0, h].T * 0.3, -1)
            want = (weights @ (new_v - v)[0, h]).norm() / (weights @ v[0, h]).norm()
            assert abs(got[3 * h + i] - float(want)) < 1e-5
    assert attention_errors(q[:0], (k, v), (k, v), 1.0) == []


def test_decay_finds_the_rank():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 512, 8, generator=g) @ torch.randn(8, 32, generator=g)
    found = decay(x + 5.0)
    assert found["left"]["4"] > 0.1 and found["left"]["8"] < 1e-9
    assert set(found["left"]) == {"4", "8", "16"}
    assert 4 < found["effective_rank"] <= 8
    assert len(found["spectrum"]) == 32 and abs(sum(found["spectrum"]) - 1) < 1e-2


def test_weighing_tokens_by_attention_helps_a_needle_that_is_looked_for():
    blocks, is_needle = synthetic(2, 64, torch.device("cpu"))
    assert is_needle.sum(-1).tolist() == [1] * 8
    q = blocks.q[..., ::2, :][..., -32:, :]
    plain = replace(
        tiny_format(), head_dim=64, k_bands=((16, 8),), v_bands=((32, 8),), name="plain"
    )
    weighted = replace(plain, name="weighted")
    methods = (SpectralMethod(plain), WeightedMethod(weighted))
    without, with_mass = (errors(m, 0, blocks, is_needle, q, 0.125) for m in methods)
    assert with_mass["k_needle"] < 0.5 * without["k_needle"]
    assert with_mass["read"] < without["read"]
    assert with_mass["k_all"] >= without["k_all"]


def test_attention_mass_keeps_what_the_blocks_last_queries_look_at():
    heads, dim = 2, 64
    k = torch.randn(1, heads, 512, 40) @ torch.randn(1, heads, 40, dim)
    v = torch.randn(1, heads, 512, 40) @ torch.randn(1, heads, 40, dim)
    queries = torch.randn(1, heads, 3, 64, dim) * 2
    weights = attention_mass(queries.flatten(0, 1), k.flatten(0, 1), scale=64**-0.5)
    assert weights.shape == (heads, 512) and float(weights.min()) >= 0.1
    assert torch.allclose(weights.mean(-1), torch.ones(heads), atol=1e-3)
    format = replace(tiny_format(), head_dim=dim, k_bands=((16, 8),), v_bands=((32, 8),))
    errors = []
    for given in (None, weights[None]):
        out = decode_pages(encode_pages(k, v, format, token_weights=given), format)
        errors.append(
            [float(((x - y).square().sum(-1)[0] * weights).sum()) for x, y in zip(out, (k, v))]
        )
    assert all(b < a for a, b in zip(*errors))


@pytest.mark.parametrize("queries", [0.0, 1.0])
def test_queries_that_tell_nothing_weigh_every_seen_token_alike(queries):
    k = torch.zeros(1, 512, 16) if queries else torch.randn(1, 512, 16)
    mass = attention_mass(torch.full((1, 3, 64, 16), queries), k, scale=1.0)[0]
    assert torch.allclose(mass[:448], mass[:1].expand(448)) and bool((mass > 0).all())


def test_attention_mass_is_the_causal_softmax_of_the_last_queries():
    """With equal keys, the query at row r gives 1 / (r + 1) to each token up to its own."""
    mass = attention_mass(torch.ones(1, 2, 64, 16), torch.zeros(1, 512, 16), scale=1.0)[0]
    rows, column = torch.arange(448, 512), torch.arange(512)
    seen = (column <= rows.unsqueeze(-1)) / (rows.unsqueeze(-1) + 1.0)
    want = seen.mean(0)
    assert torch.allclose(mass, 0.1 + 0.9 * want / want.mean(), rtol=1e-4)
    q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 512, 16)
    mass = attention_mass(q, k, scale=0.7)[0]
    scores = (q[0] @ k[0].T * 0.7).masked_fill(column > rows.unsqueeze(-1), float("-inf"))
    want = torch.softmax(scores, -1).mean((0, 1))
    assert torch.allclose(mass, 0.1 + 0.9 * want / want.mean(), rtol=1e-4)
