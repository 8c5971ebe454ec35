"""The engine and its sampler say on a CUDA device what they say elsewhere; `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import LLM, SamplingParams
from spectral_paged.cache import prefix_tiles
from spectral_paged.sampling import Penalties, SampledTokens, SampleRow, SamplingState
from spectral_paged.sampling.token_rules import TokenRules
from support.families import build
from support.foretold_drafts import SPECULATION, foretell
from support.tiny_model import VOCAB, random_prompts, tiny_format, tiny_llm, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def on_gpu(format, **options):
    defaults = {"kv_cache_bytes": 16 << 20, "max_num_seqs": 32, "debug_poison": True}
    return LLM.from_model(tiny_model().cuda(), kv_format=format, **(defaults | options))


@pytest.mark.parametrize("format", ["spectral-int8", "spectral-int8-post", "exact"])
def test_a_batch_on_the_gpu_says_what_it_says_on_the_cpu(format):
    prompts = random_prompts([1, 64, 577, 640, 1217, 1500])
    here = tiny_llm(tiny_format(format)).generate(prompts, GREEDY, use_tqdm=False)
    llm = LLM.from_model(
        tiny_model().cuda(),
        kv_format=tiny_format(format),
        kv_cache_bytes=16 << 20,
        debug_poison=True,
        enforce_eager=True,
    )
    there = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in there] == [o.outputs[0].token_ids for o in here]
    assert llm.stats()["pages_attended"] > 0 or format == "exact"
    llm.cache.check_integrity()


@pytest.mark.parametrize("format", ["exact", "spectral-int8"])
@pytest.mark.parametrize("name", ["gemma2", "gemma2, a window that is sealed", "cohere2"])
def test_graphs_of_layers_that_differ_say_what_the_cpu_says(name, format):
    prompts = random_prompts([1, 64, 97, 700, 1217, 1500])
    options = {"kv_format": format, "kv_cache_bytes": 32 << 20, "prefill_segment": 512}
    here = LLM.from_model(build(name), **options).generate(prompts, GREEDY, use_tqdm=False)
    llm = LLM.from_model(build(name).cuda(), compile_layers=False, **options)
    there = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in there] == [o.outputs[0].token_ids for o in here]
    assert llm.stats()["graph_replays"] > 0
    llm.cache.check_integrity()


@pytest.mark.parametrize("exempt", [(), (1,)])
@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_graphs_and_queued_steps_say_what_eager_lockstep_says(format, exempt):
    prompts = random_prompts([1, 64, 577, 640, 1217, 1500])
    params = [SamplingParams(temperature=0.0, max_tokens=90)] * 5
    params.append(SamplingParams(temperature=1.0, seed=5, max_tokens=90, top_p=0.9))
    options = {"exempt_layers": exempt}
    plain = on_gpu(tiny_format(format), enforce_eager=True, async_scheduling=False, **options)
    want = plain.generate(prompts, params, use_tqdm=False)
    llm = on_gpu(tiny_format(format), compile_layers=False, **options)
    for _ in range(2):
        got = llm.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
        llm.cache.check_integrity()
        llm.cache.reset_prefix_cache()
    stats = llm.stats()
    assert stats["model_step"] == "eager + cuda graphs" and stats["async_scheduling"]
    assert stats["graph_replays"] > 100 and stats["num_graphs"] < 12
    assert plain.stats()["model_step"] == "eager" and plain.stats()["graph_replays"] == 0


@pytest.mark.parametrize("exempt", [(), (1,)])
@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_drafts_in_graphs_say_what_is_said_without(format, exempt):
    """Some drafts are accepted, some are not; more tokens a step than there are seats."""
    prompts = random_prompts([1, 64, 577, 640, 1217, 1500])
    params = [SamplingParams(temperature=0.0, max_tokens=90)] * 4
    params.append(SamplingParams(temperature=1.0, seed=5, max_tokens=90, top_p=0.9))
    params.append(SamplingParams(temperature=0.0, max_tokens=90, frequency_penalty=0.7))
    options = {"compile_layers": False, "exempt_layers": exempt, "max_num_seqs": 6}
    want = on_gpu(tiny_format(format), **options).generate(prompts, params, use_tqdm=False)
    said = {len(o.prompt_token_ids): o.prompt_token_ids + o.outputs[0].token_ids for o in want}
    llm = on_gpu(tiny_format(format), speculative_config=SPECULATION, **options)
    foretell(llm.engine, lambda c, _: said[len(c.owner.prompt_token_ids)], VOCAB)
    for _ in range(2):
        got = llm.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
        llm.cache.check_integrity()
        llm.cache.reset_prefix_cache()
    stats = llm.stats()
    accepted = stats["spec_decode_num_accepted_tokens"]
    assert 0 < accepted < stats["spec_decode_num_draft_tokens"]
    assert stats["graph_replays"] > 20, "steps with drafts are graphs"


@pytest.mark.parametrize("format", ["spectral-int8", "spectral-int8-post"])
def test_graphs_with_tiles_say_what_each_sequence_says_alone(format, monkeypatch):
    monkeypatch.setattr(prefix_tiles, "MIN_PAGES", 1)
    [document, *questions] = random_prompts([1700, 5, 70, 1, 40, 33, 64, 2], seed=5)
    prompts = [[*document, *question] for question in questions]
    params = [SamplingParams(temperature=0.0, max_tokens=40 + 9 * i) for i in range(7)]
    found = []
    for off in (True, False):
        llm = on_gpu(tiny_format(format), compile_layers=False, disable_cascade_attn=off)
        llm.generate([document], SamplingParams(max_tokens=1), use_tqdm=False)
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([o.outputs[0].token_ids for o in outputs])
        stats = llm.stats()
        assert stats["graph_replays"] > 60 and (stats["pages_shared"] > 0) != off
        llm.cache.check_integrity()
    assert all(tokens == found[0] for tokens in found)


def test_penalties_say_ahead_what_they_say_in_lockstep():
    prompts = random_prompts([1, 64, 640, 1217])
    kinds = [{"frequency_penalty": 0.7}, {"repetition_penalty": 1.3}, {"presence_penalty": -0.5}]
    params = [SamplingParams(seed=i, n=2, max_tokens=60, **kind) for i, kind in enumerate(kinds)]
    params.append(SamplingParams(temperature=0.0, max_tokens=60))
    plain = on_gpu(tiny_format(), enforce_eager=True, async_scheduling=False)
    want = plain.generate(prompts, params, use_tqdm=False)
    llm = on_gpu(tiny_format(), compile_layers=False)
    got = llm.generate(prompts, params, use_tqdm=False)
    for one, other in zip(got, want, strict=True):
        assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]
    stats = llm.stats()
    assert stats["async_scheduling"] and stats["lockstep_steps"] <= len(prompts)
    assert stats["penalty_rows"] == 0 and stats["penalty_bytes"] > 0


@pytest.mark.parametrize(
    "choice",
    [{}, {"temperature": 0.0}, {"top_k": 9}, {"top_p": 0.8, "min_p": 0.1}, {"logprobs": 3}],
    ids=str,
)
def test_penalties_never_wait_for_the_gpu(choice):
    """Rows are made, copied, applied, counted and taken back while the stream has work."""
    logits = torch.randn(9, 5000, device="cuda")
    penalty = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    params = SamplingParams(**penalty, **choice)
    state, prompt = SamplingState(), list(range(4000))
    penalties = state.penalties
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = []
        for i in range(9):  # the ninth row makes the table grow
            held = penalties.hold(i, prompt, [1, 1, i], logits, siblings=range(i % 3))
            rows.append(SampleRow(params, i, 3, (7,), held))
        tokens = SampledTokens(logits, rows, state)
        tokens.count()
        tokens.count(-1)
        again = SampledTokens(logits, rows, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.ids, again.ids)
    on_cpu = Penalties()
    held = [on_cpu.hold(i, prompt, [1, 1, i], logits.cpu()) for i in range(9)]
    want = on_cpu.apply(logits.cpu(), held, [params] * 9)
    got = penalties.apply(logits, [row.penalty_row for row in rows], [params] * 9)
    torch.testing.assert_close(got.cpu(), want)


def test_token_rules_never_wait_for_the_gpu():
    """Rows are made, copied, grown, applied, counted and taken back while the stream has work."""
    logits = torch.randn(9, 5000, device="cuda")
    params = SamplingParams(logit_bias={3: 2.0}, allowed_token_ids=list(range(9)), temperature=0.0)
    rules, on_cpu = TokenRules(), TokenRules()
    words = [[[1], [2, 3, 4][: 2 + i % 2], [5, 6]] for i in range(9)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [
            rules.hold(i, params, words[i], [1, 5], logits, siblings=range(i % 3)) for i in range(9)
        ]
        ids = torch.full_like(logits[:, 0], 2).long()
        rules.count(rows, ids)
        rules.count(rows, ids, -1)
        got = rules.apply(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = [on_cpu.hold(i, params, words[0], [1, 5], logits.cpu()) for i in range(9)]
    torch.testing.assert_close(got[:1].cpu(), on_cpu.apply(logits.cpu(), held)[:1])


def test_compiled_layers_say_what_eager_ones_say():
    prompts = random_prompts([1, 64, 700, 1300])
    want = on_gpu(tiny_format(), enforce_eager=True).generate(prompts, GREEDY, use_tqdm=False)
    llm = on_gpu(tiny_format())
    got = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    assert llm.stats()["model_step"] == "compiled + cuda graphs"
