"""Bugs that an earlier spectral cache had, each with the property that rules it out.

Two more, of functions in closures and from wildcard imports, are in `test_patching`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectral_paged import PageFormat, SamplingParams, SpectralKVCache
from spectral_paged.errors import FormatError
from spectral_paged.kernels.seal.eigenvectors import eigenvectors
from spectral_paged.pages import decode_pages, encode_pages
from spectral_paged.pages.decompose import gram_basis, randomized_basis
from spectral_paged.rope import RotaryTable
from support.reference import PlainCache
from support.tiny_model import random_prompts, tiny_llm

HQ, HKV, D, SCALE = 6, 2, 16, 0.25
LONGEST = 1000
ROPE = RotaryTable.from_theta(10000.0, D, max_positions=LONGEST)


def page_format(name, **changes):
    format = PageFormat.preset(name, num_kv_heads=HKV, head_dim=D, prefill_segment=512)
    return replace(format, **changes)


def make(name="exact", table=ROPE, dtype=torch.float32, **changes):
    return SpectralKVCache(
        num_layers=1,
        num_q_heads=HQ,
        num_kv_heads=HKV,
        head_dim=D,
        rope=table,
        format=page_format(name, **changes),
        dtype=dtype,
        kv_cache_bytes=4 << 20,
        max_num_seqs=2,
        max_model_len=LONGEST,
        debug_poison=True,
    )


def run(cache, q, k, v, prompt):
    """Outputs [T, HQ, D] of one sequence: the prompt in chunks, then one token at a time."""
    cache.add_sequence("a", num_prompt_tokens=prompt)
    outs = []
    while (done := cache.num_tokens("a")) < len(q):
        new = 1 if done >= prompt else min(prompt - done, cache.chunk_limit("a"))
        cache.begin_step(cache.reserve({"a": new}))
        span = slice(done, done + new)
        outs.append(cache.attend(0, q[span], k[span], v[span]))
        assert not cache.end_step().failed
    return torch.cat(outs)


def full_attention(q, k, v):
    """Causal attention over all tokens in fp64; query head h reads KV head h // (HQ / HKV)."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(HQ // HKV, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    weights = torch.softmax(scores.masked_fill(~causal, float("-inf")), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).float()


def rel(got, want):
    return float((got.float() - want).norm() / want.norm())


def low_rank(length, rank=6):
    """[length, HKV, D] that a page of the reference ranks holds but for rounding."""
    return torch.einsum(
        "thr,hrd->thd", torch.randn(length, HKV, rank), torch.randn(HKV, rank, D) * 0.4
    )


# ---- KV heads against query heads --------------------------------------------------------


def test_gqa_stores_unexpanded_kv_heads_and_groups_query_heads_over_them():
    q, k, v = torch.randn(80, HQ, D), torch.randn(80, HKV, D), torch.randn(80, HKV, D)
    got = run(make(), q, k, v, prompt=70)
    assert rel(got, full_attention(q, k, v)) < 1e-5
    tiled = full_attention(q[:, [0, 3, 1, 4, 2, 5]], k, v)[:, [0, 2, 4, 1, 3, 5]]
    assert rel(got, tiled) > 0.1, "head h reads KV head h // 3, not h % 2"


def test_gqa_refuses_expanded_kv_heads():
    cache = make()
    cache.begin_step(cache.reserve({"a": 3}))
    wide = torch.zeros(3, HQ, D)
    with pytest.raises(FormatError, match=r"\[3, 2, 16\].*got.*\[3, 6, 16\].*unexpanded"):
        cache.attend(0, wide, wide, wide)


def test_gqa_heads_arrive_from_the_model_unexpanded(monkeypatch):
    llm = tiny_llm()
    shapes, attend = set(), llm.cache.attend

    def spy(layer, q, k, v, *sinks):
        shapes.add((q.shape[1:], k.shape[1:], v.shape[1:]))
        return attend(layer, q, k, v, *sinks)

    monkeypatch.setattr(llm.cache, "attend", spy)
    llm.generate(random_prompts([70]), SamplingParams(max_tokens=2), use_tqdm=False)
    assert shapes == {((4, 16), (2, 16), (2, 16))}


# ---- the cache survives from prefill into decode -----------------------------------------


@pytest.mark.parametrize("name", ["exact", "spectral-int8", "spectral-int8-post"])
@pytest.mark.parametrize("prompt", [30, 64, 700])
def test_decode_attends_to_everything_the_prefill_stored(name, prompt):
    q, k, v = (torch.randn(prompt + 6, h, D) for h in (HQ, HKV, HKV))
    cache = make(name)
    got = run(cache, q, k, v, prompt)
    want = PlainCache(page_format(name), ROPE, prompt, SCALE).attend(q, k, v)
    assert rel(got[prompt:], want[prompt:]) < 1e-4
    if name == "exact":
        assert rel(want, full_attention(q, k, v)) < 1e-5
    forgetful = full_attention(q[prompt:], k[prompt:], v[prompt:])
    assert rel(got[prompt:], forgetful) > 0.5
    pages = cache.stats()["pages_attended"]
    assert (pages >= 6) if name != "exact" and prompt > 640 else pages == 0


# ---- full RoPE, sine too, on every tier --------------------------------------------------

INV_FREQ = 100.0 ** -(torch.arange(0, D, 2) / D)
ROPES = {"full": (D, 1.0), "partial": (D // 2, 1.0), "scaled": (D, 1.2)}
TIERS = {"landmarks": slice(0, 64), "pages": slice(64, 576), "tail": slice(576, 800)}


def spin(x, width, factor, *, sine=True):
    """RoPE by complex numbers over the first `width` dimensions; without sine: the bug."""
    half = width // 2
    angle = torch.arange(len(x)).double()[:, None, None] * INV_FREQ[:half].double()
    turn = torch.polar(torch.full_like(angle, factor), angle)
    turn = turn if sine else turn.real.to(turn.dtype)
    z = torch.complex(x[..., :half].double(), x[..., half:width].double()) * turn
    return torch.cat((z.real, z.imag, x[..., width:].double()), dim=-1).float()


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("stored", ["pre", "frame"])
def test_full_rope_with_sine_holds_on_every_tier(kind, tier, stored):
    """V is zero outside the tier, so the answer shows that tier's attention weights.

    At full rank: turned relative to each other, low-rank keys have any rank.
    """
    width, factor = ROPES[kind]
    rope = RotaryTable.from_inv_freq(
        INV_FREQ[: width // 2], max_positions=LONGEST, attention_scaling=factor
    )
    q, k, v = torch.randn(800, HQ, D), low_rank(800), torch.zeros(800, HKV, D)
    v[TIERS[tier]] = low_rank(800)[TIERS[tier]]
    want = full_attention(spin(q, width, factor), spin(k, width, factor), v)[700:]
    ids = torch.arange(800)

    def answer(table):
        cache = make("spectral-int8", table, rope=stored, k_bands=((D, 8),))
        out = run(cache, rope.apply(q, ids), rope.apply(k, ids), v, prompt=700)[700:]
        assert cache.stats()["pages_attended"] >= 100
        return out

    assert rel(answer(rope), want) < 0.05
    no_sine = full_attention(
        spin(q, width, factor, sine=False), spin(k, width, factor, sine=False), v
    )[700:]
    assert rel(no_sine, want) > 0.3, "dropping the sine where the keys are turned would show"
    if tier == "pages" and stored == "pre":  # a frame's own turn cancels, whatever it is
        blunt = RotaryTable(rope.cos, torch.zeros_like(rope.sin))
        assert rel(answer(blunt), want) > 0.3, "dropping it where pages are turned back would show"


# ---- 1-D and 2-D position ids ------------------------------------------------------------


def test_position_ids_may_be_1d_or_2d():
    x, ids = torch.randn(5, HQ, D), torch.tensor([7, 0, 900, 3, 3])
    flat, nested = ROPE.apply(x, ids), ROPE.apply(x, ids[None])
    assert flat.shape == x.shape and torch.equal(flat, nested)
    for back in (ROPE.undo(flat, ids), ROPE.undo(flat, ids[None])):
        assert torch.allclose(back, x, atol=1e-5)
    assert not torch.allclose(flat[0], ROPE.apply(x[:1], torch.tensor([8]))[0], atol=1e-2)


def test_every_token_of_a_flat_batch_gets_its_own_position(monkeypatch):
    llm = tiny_llm()
    runner = llm.engine.runner
    got, plans, forward = [], [], runner.forward

    def note_plan(plan, *rest):
        plans.append([t for e in plan.entries for t in range(e.start, e.start + e.num_new)])
        return forward(plan, *rest)

    monkeypatch.setattr(runner, "forward", note_plan)
    runner.model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: got.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (9, 2, 4)]
    llm.generate(random_prompts([5, 1300, 66]), params, use_tqdm=False)
    assert all(ids.dim() == 2 and ids.shape[0] == 1 for ids in got)
    assert [ids[0].tolist() for ids in got] == plans
    assert any(len(set(p)) < len(p) for p in plans) and len(plans[0]) > len(plans[-1])


# ---- half precision into the decomposition -----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_half_precision_input_decomposes_as_its_fp32_copy(dtype, size):
    """QR knows no half precision, and the squares of a Gram matrix leave its range."""
    x = (torch.randn(4, 512, D) * size).to(dtype)
    for basis in (gram_basis(x, 8, eigenvectors), randomized_basis(x, 8, seed=1)):
        assert basis.dtype == torch.float32
        assert rel(basis @ basis.transpose(1, 2), torch.eye(8).expand(4, 8, 8)) < 1e-4
    k, v = ((low_rank(512) * size).to(dtype).transpose(0, 1)[None] for _ in "kv")
    for decomposition in ("gram", "randomized"):
        base = page_format("spectral-int8")
        fields = {f: getattr(base, f) for f in base.__dataclass_fields__}
        format = PageFormat(**fields | {"decomposition": decomposition})
        pages = encode_pages(k, v, format)
        assert torch.equal(pages, encode_pages(k.float(), v.float(), format))
        assert rel(decode_pages(pages, format)[0], k.float()) < 0.03


# ---- softmax in fp32 ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "spectral-int8-post"])
@pytest.mark.parametrize("peak", [30.0, 300.0, 3000.0])
def test_large_scores_in_fp16_do_not_overflow_the_softmax(name, peak):
    """exp(12) is past fp16; scores here reach plus and minus `peak`, in prefill and in decode."""
    assert torch.isinf(torch.tensor(peak, dtype=torch.float16).exp())
    along = torch.nn.functional.normalize(torch.randn(D), dim=0)
    size = (peak / SCALE) ** 0.5
    k = (torch.rand(720, HKV, 1) * 2 - 1) * size * along
    q = torch.where(torch.rand(720, HQ, 1) < 0.5, -1.0, 1.0) * size * along
    q, k, v = q.half(), k.half(), low_rank(720).half()
    got = run(make(name, table=None, dtype=torch.float16), q, k, v, prompt=700)
    assert got.dtype == torch.float16 and bool(torch.isfinite(got).all())
    assert float(got.abs().max()) <= 1.02 * float(v.abs().max()), "weights sum to one"
    if peak == 30.0:
        assert rel(got, full_attention(q, k, v)) < 0.05
