"""The torch twins against plain fp32 attention: tiers, merging, groups, awkward sizes."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.kernels.chunk.reference import ChunkSpans, chunk_attention
from spectral_paged.kernels.decode.reference import (
    decode_attention,
    exact_decode,
    spectral_decode,
)
from spectral_paged.kernels.exact.reference import (
    ExactPlaces,
    exact_append,
    exact_copy,
    exact_gather,
)
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.kernels.math.scores import merge, with_sinks
from spectral_paged.kernels.page.layout import exact_page_bytes
from spectral_paged.kernels.rebuild.reference import spectral_rebuild
from spectral_paged.pages import PageFormat, decode_pages, encode_pages
from spectral_paged.rope import RotaryTable
from support.kernel_cases import MILD, attend, attend_case, placed_pages, some_sinks

D = 16


def plain(q, k, v, scale, causal=False):
    """fp64 attention with expanded heads: q [T, Hq, D], k, v [H, L, D] -> [T, Hq, D], lse."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = torch.einsum("thd,hld->htl", q.double(), k) * scale
    if causal:
        t, n = q.shape[0], k.shape[1]
        hidden = torch.arange(n) > torch.arange(n - t, n).unsqueeze(-1)
        scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.einsum("htl,hld->thd", torch.softmax(scores, -1), v)
    return out.float(), torch.logsumexp(scores, -1).T.float()


# ---- merge -------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0, 1e4, -1e4])
@pytest.mark.parametrize("cuts", [[], [5], [1, 64, 65], [0, 100]])
def test_merged_parts_equal_the_whole(shift, cuts):
    scores = torch.randn(3, 100) * 5 + shift
    v = torch.randn(3, 100, D)
    bounds = [0, *cuts, 100]
    outs, lses = [], []
    for a, b in zip(bounds, bounds[1:]):
        part = scores[:, a:b]
        lses.append(torch.logsumexp(part, -1))
        outs.append(torch.softmax(part, -1).unsqueeze(1) @ v[:, a:b])
    out, lse = merge([o.squeeze(1) for o in outs], lses)
    want = (torch.softmax(scores, -1).unsqueeze(1) @ v).squeeze(1)
    assert torch.allclose(out, want, atol=1e-4)
    assert torch.allclose(lse, torch.logsumexp(scores, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0, 1e4, -1e4])
def test_a_sink_is_one_more_score_of_a_softmax_whose_value_is_zero(shift):
    scores, v = torch.randn(5, 100) * 5 + shift, torch.randn(5, 100, D)
    sinks = some_sinks(5) + shift

    def attention(scores):
        return (scores.softmax(-1).unsqueeze(1)[..., :100] @ v).squeeze(1)

    got = with_sinks(attention(scores), scores.logsumexp(-1), sinks)
    assert torch.allclose(got, attention(torch.cat((scores, sinks[:, None]), -1)), atol=1e-4)
    nothing = torch.full((5,), float("-inf"))
    assert not with_sinks(torch.zeros(5, D), nothing, sinks).any(), "no tokens: zeros, not NaN"


@pytest.mark.parametrize("pages", [True, False])
def test_a_sink_takes_its_part_of_all_tiers_at_once(pages):
    """Not of each tier by itself: what it leaves is a share of the whole, by the whole's sum."""
    args, options = attend_case("int8-post-64", (2, 1), (70, 3))
    options |= MILD
    if not pages:
        args = (*args[:4], None, args[5] * 0)
    plain, sinks = attend(decode_attention, args, options), some_sinks(6)
    ratios = attend(decode_attention, args, options | {"sinks": sinks}) / plain
    assert torch.allclose(ratios, ratios[..., :1].expand_as(ratios), rtol=1e-3), "a share a head"
    share = ratios[..., 0]
    assert torch.allclose(share[:, 0], torch.ones(2)) and not share[:, 2].any()
    low, high = (
        attend(decode_attention, args, options | {"sinks": torch.full((6,), at)})
        for at in (5.0, 7.0)
    )
    odds = [(plain / x - 1)[..., 0] for x in (low, high)]  # exp(sink - lse)
    assert torch.allclose(odds[1] / odds[0], torch.full((2, 6), 2.0).exp(), rtol=1e-2)


def test_empty_parts_have_no_weight_and_all_empty_is_zero_not_nan():
    empty = torch.full((2,), float("-inf"))
    garbage = torch.full((2, D), float("nan"))
    out, lse = merge([garbage, torch.ones(2, D)], [empty, torch.tensor([1.0, -1e30])])
    assert torch.equal(out, torch.ones(2, D))
    out, lse = merge([garbage, garbage], [empty, empty])
    assert torch.equal(out, torch.zeros(2, D)) and bool(torch.isneginf(lse).all())


# ---- exact pages -------------------------------------------------------------------------


def exact_setup(counts, heads, dtype=torch.float32, seed=0):
    """A plane full of NaN with sequences of `counts` tokens in scattered pages."""
    g = torch.Generator().manual_seed(seed)
    page = exact_page_bytes(heads, D, dtype.itemsize)
    pages = [-(-c // 64) for c in counts]
    order = torch.randperm(sum(pages) + 3, generator=g) * (page // 128)
    plane = torch.full(((sum(pages) + 3) * page,), 0xFF, dtype=torch.uint8)
    table = torch.full((len(counts), max(pages) + 2), 10**6, dtype=torch.int32)
    kv, at = [], 0
    for i, (count, n) in enumerate(zip(counts, pages)):
        k, v = (torch.randn(2, count, heads, D, generator=g) * 2).to(dtype)
        table[i, :n] = order[at : at + n]
        at += n
        place = torch.arange(count)
        exact_append(k, v, plane, table[i][place // 64], place % 64)
        kv.append((k.transpose(0, 1), v.transpose(0, 1)))
    return plane, table, kv


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_appended_is_gathered(count, dtype):
    plane, table, [(k, v)] = exact_setup([count], 2, dtype)
    got = exact_gather(plane, table[0], count, 2, D, dtype)
    assert torch.equal(got[0], k) and torch.equal(got[1], v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_puts_what_is_gathered_into_its_rows_and_nothing_else(dtype):
    plane, table, kv = exact_setup([65, 200, 1], 2, dtype)
    parts, want, at = [], torch.full((2, 2, 300, D), 9.0).to(dtype), 3
    for i, (k, v) in enumerate(kv):
        count = k.shape[1]
        before = 64 * torch.arange(-(-count // 64))
        counts = (count - before).clamp(max=64)
        parts.append(torch.stack((table[i][: len(before)], at + before, counts)))
        want[:, :, at : at + count] = torch.stack((k, v))
        at += count + 5
    got = torch.full_like(want, 9.0)
    exact_copy(plane, ExactPlaces(*torch.cat(parts, dim=1).int()), got)
    assert torch.equal(got, want)


@pytest.mark.parametrize("rope", ["frame", "post"])
def test_pages_of_several_sequences_are_rebuilt_where_they_belong(rope):
    format = page_format(rope=rope)
    plane, table = page_setup([3, 4], format)
    args = (None, plane, table, torch.tensor([3, 4]))
    got, want = placed_pages(spectral_rebuild, args, where(format, WIDE_ROPE), dtype=torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("first, count", [(0, 1), (1, 62), (63, 2), (64, 64), (100, 150)])
def test_an_append_writes_its_own_tokens_only(first, count):
    """Later tokens join a page that earlier ones began; every other byte stays."""
    plane, table, _ = exact_setup([300], 3)
    before = plane.clone()
    k, v = torch.randn(2, count, 3, D)
    place = torch.arange(first, first + count)
    exact_append(k, v, plane, table[0][place // 64], place % 64)
    old, new = (exact_gather(p, table[0], 300, 3, D, torch.float32) for p in (before, plane))
    for x, y, z in zip(old, new, (k, v)):
        assert torch.equal(y[:, place], z.transpose(0, 1))
        rest = torch.ones(300, dtype=torch.bool).index_fill_(0, place, False)
        assert torch.equal(y[:, rest], x[:, rest])
    assert int((plane != before).sum()) <= 2 * count * 3 * D * 4


@pytest.mark.parametrize("group", [1, 3, 8])
def test_exact_decode_is_plain_attention(group):
    counts = [1, 64, 0, 65, 300]
    plane, table, kv = exact_setup(counts, 2)
    q = torch.randn(len(counts), 2 * group, D)
    out, lse = exact_decode(
        q, plane, table, torch.tensor(counts), num_kv_heads=2, scale=0.25, dtype=torch.float32
    )
    for i, count in enumerate(counts):
        if count == 0:
            assert torch.equal(out[i], torch.zeros_like(out[i]))
            assert bool(torch.isneginf(lse[i]).all())
            continue
        want, want_lse = plain(q[i : i + 1], *kv[i], 0.25)
        assert torch.allclose(out[i], want[0], atol=1e-5)
        assert torch.allclose(lse[i], want_lse[0], atol=1e-5)


@pytest.mark.parametrize("peak", [30.0, -30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_in_half_precision_do_not_overflow(peak, dtype):
    """exp(30) is past fp16's 65,504: a softmax in fp16 would give Inf / Inf."""
    plane, table, [(k, v)] = exact_setup([130], 1, dtype)
    q = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    largest = (q.float()[0] @ k[0].float().T).abs().max()
    scale = peak / float(largest)
    out, lse = exact_decode(
        q, plane, table, torch.tensor([130]), num_kv_heads=1, scale=scale, dtype=dtype
    )
    want, _ = plain(q, k, v, scale)
    assert bool(torch.isfinite(out).all()) and torch.allclose(out[0], want[0], atol=1e-4)
    chunk = chunk_attention(q, k, v, spans=ChunkSpans.of([1], [k.shape[1]], q.device), scale=scale)
    assert torch.allclose(chunk[0], want[0], atol=1e-4)


# ---- pages -------------------------------------------------------------------------------


DIM, RANKS = 32, (16, 32)  # K and V of different rank, so that a swap of sides shows
WIDE_ROPE = RotaryTable.from_theta(10000.0, DIM, max_positions=4096)
PARTIAL_ROPE = RotaryTable.from_inv_freq(
    torch.tensor([1.0, 0.3, 0.01, 1e-4]), max_positions=4096, attention_scaling=1.3
)


def page_format(**kw):
    k_rank, v_rank = RANKS
    return PageFormat("t", 2, DIM, ((k_rank, 8),), ((v_rank, 8),), **kw)


def page_setup(counts, format):
    """A plane of 0xFF with sequences of `counts` pages in scattered places."""
    units = format.page_bytes // 128
    plane = torch.full(((sum(counts) + 2) * format.page_bytes,), 0xFF, dtype=torch.uint8)
    table = torch.full((len(counts), max(counts) + 2), 10**6, dtype=torch.int32)
    order = (torch.randperm(sum(counts) + 2) * units).tolist()
    for i, count in enumerate(counts):
        k, v = torch.randn(2, count, 2, 512, DIM)
        for b, page in enumerate(encode_pages(k + 1, v - 1, format)):
            table[i, b] = order.pop()
            plane[table[i, b] * 128 : (table[i, b] + units) * 128] = page
    return plane, table


def where(format, rope):
    return {
        "layout": format.layout,
        "first_position": format.num_landmark_tokens,
        "cos": rope.cos,
        "sin": rope.sin,
    }


@pytest.mark.parametrize("rope", ["pre", "frame", "post"])
@pytest.mark.parametrize("landmarks", [0, 64, 128])
@pytest.mark.parametrize("table_of", [WIDE_ROPE, PARTIAL_ROPE])
def test_rebuilt_history_is_the_decoded_pages_rotated_to_their_positions(rope, landmarks, table_of):
    format = page_format(rope=rope, num_landmark_tokens=landmarks)
    plane, table = page_setup([2, 3], format)
    got_k, got_v = spectral_rebuild(
        plane, table[1, :3], dtype=torch.float32, **where(format, table_of)
    )
    for b in range(3):
        at = int(table[1, b]) * 128
        k, v = (x[0] for x in decode_pages(plane[None, at : at + format.page_bytes], format))
        span = slice(512 * b, 512 * (b + 1))
        if rope != "post":
            positions = torch.arange(landmarks + 512 * b, landmarks + 512 * (b + 1))
            if rope == "frame":
                middles = [landmarks + 512 * b + 128 * i + 64 for i in range(4)]
                positions = torch.tensor(middles).repeat_interleave(128)
            k = table_of.apply(k.transpose(0, 1), positions).transpose(0, 1)
        assert torch.allclose(got_k[:, span], k, atol=1e-5)
        assert torch.allclose(got_v[:, span], v, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("rope", ["pre", "frame", "post"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("table_of", [WIDE_ROPE, PARTIAL_ROPE])
def test_decode_from_pages_is_attention_over_what_they_rebuild(group, rope, mean, table_of):
    format = page_format(rope=rope, mean=mean)
    counts = [0, 1, 3, 2]
    plane, table = page_setup(counts, format)
    q = torch.randn(len(counts), 2 * group, DIM)
    common = where(format, table_of)
    out, lse = spectral_decode(q, plane, table, torch.tensor(counts), scale=0.25, **common)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and bool(torch.isneginf(lse[0]).all())
    for i, count in list(enumerate(counts))[1:]:
        k, v = spectral_rebuild(plane, table[i, :count], dtype=torch.float32, **common)
        assert k.shape == (2, count * 512, DIM)
        want, want_lse = plain(q[i : i + 1], k, v, 0.25)
        assert torch.allclose(out[i], want[0], atol=1e-4)
        assert torch.allclose(lse[i], want_lse[0], atol=1e-4)


@pytest.mark.parametrize("scale", [5.0, -5.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_against_pages_do_not_overflow(scale, dtype):
    """Scores reach several hundred; partial sums per page are far apart and still add up."""
    format = page_format()
    plane, table = page_setup([3], format)
    q = torch.randn(1, 6, DIM).to(dtype)
    common = where(format, WIDE_ROPE)
    out, lse = spectral_decode(q, plane, table, torch.tensor([3]), scale=scale, **common)
    k, v = spectral_rebuild(plane, table[0, :3], dtype=torch.float32, **common)
    want, want_lse = plain(q, k, v, scale)
    assert float(want_lse.abs().max()) > 30
    assert torch.allclose(out[0], want[0], atol=2e-3)
    assert torch.allclose(lse[0], want_lse[0], rtol=1e-5)


# ---- chunks and rotation -----------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, length",
    [(1, 1), (2, 2), (255, 255), (257, 257), (1, 64), (3, 700), (257, 600), (513, 777)],
)
@pytest.mark.parametrize("group", [1, 3])
def test_a_chunk_is_causal_from_the_bottom_right(tokens, length, group):
    q = torch.randn(tokens, 2 * group, D)
    k, v = torch.randn(2, 2, length, D)
    spans = ChunkSpans.of([tokens], [length], q.device)
    got = chunk_attention(q, k, v, spans=spans, scale=0.3)
    assert torch.allclose(got, plain(q, k, v, 0.3, causal=True)[0], atol=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tokens, length, window", [(1, 9, 3), (300, 300, 1), (257, 600, 200)])
def test_a_chunk_sees_its_window_and_capped_scores_and_sinks(
    tokens, length, window, softcap, sinks
):
    q, k, v = torch.randn(tokens, 6, D), *torch.randn(2, 2, length, D)
    spans = ChunkSpans.of([tokens], [length], q.device)
    options = {"softcap": softcap, "window": window, "sinks": some_sinks(6) if sinks else None}
    got = chunk_attention(q, k, v, spans=spans, scale=0.3, **options)
    at = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
    scores = torch.einsum("tghd,gld->ghtl", q.unflatten(1, (2, 3)), k) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill((at < 0) | (at >= window), float("-inf"))
    if sinks:
        of_heads = options["sinks"].view(2, 3, 1, 1).expand(-1, -1, tokens, -1)
        scores = torch.cat((scores, of_heads), -1)
    weights = scores.softmax(-1)[..., :length]
    want = torch.einsum("ghtl,gld->tghd", weights, v).flatten(1, 2)
    assert torch.allclose(got, want, atol=1e-5)


def test_chunks_behind_each_other_see_their_own_keys_only():
    queries, keys = [1, 300, 37, 64], [1, 300, 600, 65]
    q, k = torch.randn(sum(queries), 6, D), torch.randn(2, sum(keys), D)
    v = torch.randn(2, sum(keys), D)
    spans = ChunkSpans.of(queries, keys, q.device)
    got = chunk_attention(q, k, v, spans=spans, scale=0.3)
    for mine, own in spans:
        want = plain(q[mine], k[:, own], v[:, own], 0.3, causal=True)[0]
        assert torch.allclose(got[mine], want, atol=1e-5)
    with pytest.raises(ValueError, match="2.* queries"):
        ChunkSpans.of([2], [1], q.device)


@pytest.mark.parametrize("factor", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
def test_unrotation_is_exact_where_the_model_scales_its_table_too(factor, rotary_dim):
    table = RotaryTable.from_inv_freq(
        10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim),
        max_positions=3000,
        attention_scaling=factor,
    )
    x = torch.randn(50, 2, D)
    positions = torch.arange(2950, 3000)
    turned = table.apply(x, positions)
    assert torch.allclose(table.undo(turned, positions), x, atol=1e-5)
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.allclose(
        turned[..., :rotary_dim].norm(dim=-1), factor * x[..., :rotary_dim].norm(dim=-1), rtol=1e-4
    )


def test_rotation_is_the_complex_product():
    x, angle = torch.randn(D), torch.rand(D // 2) * 6
    pairs = torch.complex(x[: D // 2], x[D // 2 :]) * torch.polar(torch.ones(D // 2), angle)
    got = rotate(x, torch.cos(angle), torch.sin(angle))
    assert torch.allclose(got, torch.cat((pairs.real, pairs.imag)), atol=1e-5)
