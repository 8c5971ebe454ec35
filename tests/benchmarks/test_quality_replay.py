"""The dense replay has the logits of transformers' own model, and seals blocks by the rule."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.benchmarks.quality import replay as replay_module
from spectral_paged.benchmarks.quality.methods import (
    Exact,
    Fp8,
    Kivi,
    PerToken,
    Rotated,
)
from spectral_paged.benchmarks.quality.page_methods import SpectralMethod
from spectral_paged.benchmarks.quality.peers import peer_methods
from spectral_paged.benchmarks.quality.replay import Replay
from spectral_paged.benchmarks.quality.shared_attention import attend_with_lse, merged
from spectral_paged.cache import Visibility
from spectral_paged.errors import InvalidRequestError, PromptTooLongError, UnsupportedModelError
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.models.geometry import ModelGeometry, rotary_table
from spectral_paged.models.loader import LoadedModel
from support import families
from support.tiny_model import VOCAB, random_prompts, tiny_format, tiny_llm, tiny_model

IDS = random_prompts([2000], seed=5)[0]
LOSSY = Kivi(2)


@functools.cache
def stock():
    return tiny_model()


@functools.cache
def replay():
    model = tiny_model()
    return Replay(LoadedModel("tiny", model, None, ModelGeometry.from_config(model.config)))


@functools.cache
def context(num_tokens=1300):
    return replay().prefill(IDS[:num_tokens])


@torch.no_grad()
def stock_logits(ids):
    return stock()(torch.tensor([ids])).logits[0]


def close(a, b, tolerance=1e-4):
    return bool(((a - b).abs() <= tolerance).all())


def continuations(count, length, seed=1):
    return torch.tensor(random_prompts([length] * count, seed=seed))


# ---- against the stock model -------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 640, 1300])
def test_logits_over_an_exact_context_are_the_stock_models(num_tokens):
    ids = IDS[: num_tokens + 40]
    got = replay().logits(context(num_tokens), torch.tensor([ids[num_tokens:]]))
    assert got.dtype == torch.float32
    assert close(got[0], stock_logits(ids)[num_tokens:])


def test_an_exactly_sealed_context_changes_nothing():
    sealed = replay().seal(context(), Exact())
    assert sealed.num_sealed == 2 and sealed.method == "exact"
    assert close(sealed.k, context().k, 1e-5) and torch.equal(sealed.v, context().v)
    more = torch.tensor([IDS[1300:1340]])
    assert close(replay().logits(sealed, more)[0], stock_logits(IDS[:1340])[1300:])


def test_chunks_of_a_prefill_do_not_show(monkeypatch):
    monkeypatch.setattr(replay_module, "CHUNK_TOKENS", 100)
    chunked = replay().prefill(IDS[:1300])
    assert close(chunked.k, context().k, 1e-5) and close(chunked.v, context().v, 1e-5)


@torch.no_grad()
def stock_greedy(ids, max_tokens, eos=None):
    row = torch.tensor([ids])
    out = stock().generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=eos,
    )
    return out[0, len(ids) :].tolist()


def test_generate_is_the_stock_models_greedy_for_ragged_prompts():
    prompts = random_prompts([1, 9, 30, 2], seed=8)
    got = replay().generate(context(), prompts, 24)
    assert got == [stock_greedy(IDS[:1300] + p, 24) for p in prompts]


def test_generate_ends_with_the_first_eos():
    prompts = random_prompts([4, 7, 11], seed=9)
    free = replay().generate(context(), prompts, 24)
    eos = free[1][5]
    got = replay().generate(context(), prompts, 24, eos)
    assert got == [stock_greedy(IDS[:1300] + p, 24, eos) for p in prompts]
    assert got[1] == free[1][: free[1].index(eos) + 1]
    assert replay().generate(context(), prompts, 24, [eos, VOCAB + 1]) == got
    assert replay().generate(context(), prompts, 1) == [f[:1] for f in free]
    assert replay().generate(context(), [], 5) == []


# ---- batches -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(2, 50), st.integers(0, 99))
def test_a_batch_of_continuations_equals_each_alone(count, length, seed):
    ids = continuations(count, length, seed)
    sealed = replay().seal(context(), LOSSY)
    together = replay().logits(sealed, ids)
    for row, alone in zip(together, ids):
        assert close(row, replay().logits(sealed, alone[None])[0])


def test_prompts_of_a_batch_generate_what_each_does_alone():
    prompts = random_prompts([3, 50, 17], seed=2)
    sealed = replay().seal(context(), LOSSY)
    together = replay().generate(sealed, prompts, 16)
    assert together == [replay().generate(sealed, [p], 16)[0] for p in prompts]


def test_generate_follows_the_teacher_forced_logits_of_a_sealed_context():
    prompt = random_prompts([12], seed=3)[0]
    sealed = replay().seal(context(), LOSSY)
    out = replay().generate(sealed, [prompt], 16)[0]
    logits = replay().logits(sealed, torch.tensor([prompt + out]), logits_from=len(prompt) - 1)
    assert logits[0, :-1].argmax(-1).tolist() == out


def test_parts_of_the_logits():
    ids = continuations(3, 20)
    whole = replay().logits(context(), ids)
    assert torch.equal(replay().logits(context(), ids, logits_from=15), whole[:, 15:])
    hidden = replay().hidden(context(), ids)
    assert close(replay().project(hidden[1, 3]), whole[1, 3], 1e-5)
    chosen = whole.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert close(replay().token_log_probs(context(), ids), chosen, 1e-5)
    assert close(replay().token_log_probs(context(), ids, logits_from=7), chosen[:, 7:], 1e-5)


# ---- sealing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_tokens, blocks", [(64, 0), (639, 0), (640, 1), (1151, 1), (1152, 2), (2000, 3)]
)
def test_full_blocks_between_landmarks_and_hot_window_are_sealed(num_tokens, blocks):
    exact = context(num_tokens)
    before = (exact.k.clone(), exact.v.clone())
    sealed = replay().seal(exact, LOSSY)
    assert sealed.num_sealed == blocks
    assert Visibility.of(tiny_format()).visible_blocks(num_tokens, num_tokens) == blocks
    end = 64 + 512 * blocks
    for new, old, kept in ((sealed.k, exact.k, before[0]), (sealed.v, exact.v, before[1])):
        assert torch.equal(old, kept)  # the exact context stays as it was
        same = (new == old).all(dim=-1).all(dim=0).all(dim=0)
        assert bool(same[:64].all() and same[end:].all())
        assert not bool(same[64:end].any())


SEALERS = [*peer_methods(0), SpectralMethod(tiny_format())]


@pytest.mark.parametrize("method", SEALERS, ids=lambda m: m.name)
def test_a_sealed_block_is_what_the_method_makes_of_it(method):
    replay().calibrate([method], IDS[:300])
    exact, start = context(), method.num_landmark_tokens
    sealed = replay().seal(exact, method)
    table = rotary_table(replay().model, 2000, torch.device("cpu"))
    place = slice(start + 512, start + 1024)
    cos, sin = (x[place][None, None] for x in (table.cos, table.sin))
    for layer in range(2):
        k = rotate(exact.k[layer, None, :, place], cos, sin, inverse=True)
        new_k, new_v = method.rebuild(layer, k, exact.v[layer, None, :, place], cos, sin)
        assert torch.equal(sealed.k[layer, :, place], new_k[0])
        assert torch.equal(sealed.v[layer, :, place], new_v[0])


def test_a_lossier_method_strays_further():
    ids = continuations(2, 40)
    want = replay().logits(context(), ids).log_softmax(-1)

    def divergence(method):
        got = replay().logits(replay().seal(context(), method), ids).log_softmax(-1)
        return float((want.exp() * (want - got)).sum(-1).mean())

    values = [divergence(m) for m in (Exact(), PerToken(8), Rotated(4), Rotated(2))]
    assert values == sorted(values) and values[0] < 1e-8 < values[1]


def test_what_is_sealed_is_not_sealed_again():
    sealed = replay().seal(context(), LOSSY)
    with pytest.raises(InvalidRequestError, match="sealed by kivi2"):
        replay().seal(sealed, Exact())


def test_calibration_reads_the_text_it_is_given():
    low, high = Fp8(calibrated=True), Fp8(calibrated=True)
    replay().calibrate([low, Exact()], IDS[:20])
    replay().calibrate([high], IDS[:1300])
    k_peak = float(context().k[0].abs().max())
    assert high.scales[0][0] == pytest.approx(k_peak / 448)
    assert low.scales[0][0] < high.scales[0][0]


# ---- prefill through pages ---------------------------------------------------------------


def test_prefill_through_an_exact_method_is_the_plain_prefill():
    through = replay().prefill_through(IDS[:1300], Exact(), 512)
    assert through.num_sealed == 2
    assert close(through.k, context().k) and close(through.v, context().v)


@pytest.mark.parametrize("num_tokens", [500, 1088, 1151, 1152, 1800])
def test_prefill_through_at_512_is_one_token_after_another_by_the_rule(num_tokens):
    """Each token sees as pages the blocks b with segment start >= 64 + 512 (b + 1) + 64."""
    ids, r = IDS[:num_tokens], replay()
    through = r.prefill_through(ids, LOSSY, 512)
    step = r.prefill(ids[:64])
    for start in range(64, num_tokens, 32):
        visible = max(0, (start - 64) // 512 * 512 - 64) // 512
        step = r._seal_until(step, LOSSY, 64 + 512 * visible + 64)
        assert step.num_sealed == visible
        end = min(start + 32, num_tokens)
        grown = r._empty(end, False)
        grown.k[:, :, :start], grown.v[:, :, :start] = step.k, step.v
        r._fill(grown, ids, start, end)
        step = replay_module.replace(step, k=grown.k, v=grown.v)
    step = r._seal_until(step, LOSSY, num_tokens)
    assert step.num_sealed == through.num_sealed
    # rounding to two bits may amplify one ulp into a step at a tie: a few values in a thousand
    for a, b in ((step.k, through.k), (step.v, through.v)):
        assert float(((a - b).abs() > 1e-3).float().mean()) < 2e-3
    plain = r.seal(r.prefill(ids), LOSSY)
    if num_tokens > 1088:  # a lossy page was read while prefilling, and that can be told
        assert not close(through.k[:, :, 1088:], plain.k[:, :, 1088:], 1e-2)
    else:
        assert close(through.k[:, :, -64:], plain.k[:, :, -64:])


def test_a_longer_segment_sees_fewer_pages():
    ids = IDS[:1800]
    whole = replay().prefill_through(ids, LOSSY, 2048)
    plain = replay().seal(replay().prefill(ids), LOSSY)
    assert torch.equal(whole.k, plain.k) and torch.equal(whole.v, plain.v)
    halves = replay().prefill_through(ids, LOSSY, 1024)
    assert close(halves.k[:, :, :576], whole.k[:, :, :576])
    assert not close(halves.k[:, :, -64:], whole.k[:, :, -64:], 1e-3)


# ---- attention and refusals --------------------------------------------------------------


@pytest.mark.parametrize("dim, length, past", [(16, 1, 7), (64, 33, 130), (128, 5, 513)])
def test_parts_merge_to_one_softmax(dim, length, past):
    q, k, v = torch.randn(3, 2, 4, length + past, dim).unbind()
    q, scale = q[:, :, past:], dim**-0.5
    parts = [
        attend_with_lse(q, k[:, :, past:], v[:, :, past:], scale=scale, causal=True),
        attend_with_lse(q, k[:, :, :past], v[:, :, :past], scale=scale, causal=False),
    ]
    mask = torch.ones(length, length + past, dtype=torch.bool).tril(past)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert close(merged(parts), want, 1e-5)


def test_what_cannot_be_served_is_refused():
    r = replay()
    with pytest.raises(InvalidRequestError, match="at least one token"):
        r.prefill([])
    with pytest.raises(PromptTooLongError, match="4097 tokens, the model serves 4096"):
        r.prefill([1] * 4097)
    with pytest.raises(InvalidRequestError, match="segment is 600"):
        r.prefill_through(IDS[:700], Exact(), 600)
    with pytest.raises(InvalidRequestError, match="must not be empty"):
        r.generate(context(), [[1], []], 4)
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        r.generate(context(), [[1]], 0)


@pytest.mark.parametrize(
    "name, part",
    [("gpt_oss", "windows and sinks"), ("gemma2", "windows and soft caps")],
)
def test_attention_that_is_not_plain_is_refused(name, part):
    model = families.build(name)
    with pytest.raises(UnsupportedModelError, match=f"has {part}.*take a llama"):
        Replay(LoadedModel(name, model, None, ModelGeometry.from_config(model.config)))


def test_a_half_precision_context_survives_an_exact_seal():
    """Un-rotating and rotating in fp32 stays below half a unit of bf16, except where a rotation
    cancels; there it is off by one ulp of fp32 of the pair."""
    model = tiny_model().bfloat16()
    r = Replay(LoadedModel("tiny", model, None, ModelGeometry.from_config(model.config)))
    exact = r.prefill(IDS[:700])
    sealed = r.seal(exact, Exact())
    assert sealed.k.dtype == torch.bfloat16 and sealed.num_sealed == 1
    assert torch.equal(sealed.v, exact.v) and close(sealed.k, exact.k, 1e-6)
    assert float((sealed.k != exact.k).float().mean()) < 1e-3
    assert r.logits(sealed, torch.tensor([IDS[700:720]])).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 0.5)])
def test_cuda_says_what_the_cpu_says(dtype, tolerance):
    model = tiny_model().to("cuda", dtype)
    r = Replay(LoadedModel("tiny", model, None, ModelGeometry.from_config(model.config)))
    ids = continuations(3, 40)
    want = replay().logits(context(), ids)
    exact = r.prefill(IDS[:1300])
    assert close(r.logits(exact, ids).cpu(), want, tolerance)
    sealed = r.seal(exact, LOSSY)
    assert torch.equal(r.seal(exact, LOSSY).k, sealed.k)
    again = [r.logits(sealed, ids) for _ in range(2)]
    assert torch.equal(*again)
    if dtype == torch.float32:
        prompts = random_prompts([3, 20], seed=4)
        assert r.generate(exact, prompts, 16) == replay().generate(context(), prompts, 16)


@pytest.mark.parametrize("segment", [512, 1024])
@pytest.mark.parametrize("preset", ["spectral-int8", "spectral-page"])
def test_the_engine_over_real_pages_generates_what_the_replay_does(preset, segment):
    """What is judged is what runs: pages, tables and scheduler change nothing."""
    format = replace(tiny_format(preset), prefill_segment=segment)
    # the last token opens a segment, so both let it see every block that is due
    (prompt,) = random_prompts([64 + 2048 + 1], seed=5)
    sealed = replay().prefill_through(prompt[:-1], SpectralMethod(format), segment)
    assert sealed.num_sealed == 3
    (want,) = replay().generate(sealed, [prompt[-1:]], 12)
    llm = tiny_llm(format)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate([prompt], greedy)
    assert output.outputs[0].token_ids == want
    assert llm.stats()["pages_attended"] > 0
