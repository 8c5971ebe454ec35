"""Log-probabilities of prompts are those of the logits that the engine's own queries give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.errors import InvalidRequestError, NonFiniteError, SamplingParamsError
from spectral_paged.models import runner as model_runner
from support import families, model_variants
from support.checked_engine import CheckedEngine
from support.digit_model import VOCAB, candidates, formats, logits_of, scripts_of, sums
from support.tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model

LENGTHS = [1, 2, 63, 65, 200]
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=2)


def own_logprobs(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


def check(tables, ids, want, num_top):
    """Compare the tables of a prompt with log-probabilities `[T, vocab]`."""
    assert tables[0] is None and len(tables) == len(ids)
    for place, table in enumerate(tables[1:], start=1):
        row = want[place - 1]
        best = row.topk(num_top)
        assert table.keys() == {ids[place], *best.indices.tolist()}
        for token, entry in table.items():
            assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
        own = row[ids[place]]
        fewest, most = ((row > own + by).sum() + 1 for by in (1e-3, -1e-3))  # ties may turn
        assert fewest <= table[ids[place]].rank <= most
        assert [table[t].rank for t in best.indices.tolist()] == list(range(1, num_top + 1))


ALIKE = ("llama", "granite", "granitemoe", "olmoe, clipped", "qwen2_moe, a shared expert")
MODELS = [pytest.param(model_variants.build, n, id=n) for n in ALIKE]
MODELS += [pytest.param(families.build, name, id=name) for name in families.FAMILIES]


@pytest.mark.parametrize("build, name", MODELS)
def test_exact_pages_give_the_models_own(build, name):
    """Scales and soft caps of the final logits are the family's."""
    torch.manual_seed(3)
    prompts = [torch.randint(1, 199, (length,)).tolist() for length in LENGTHS]
    want = [own_logprobs(build(name), ids) for ids in prompts]
    with families.llm_of(build(name), kv_format="exact", max_num_batched_tokens=97) as llm:
        outputs = llm.generate(prompts, SCORE, use_tqdm=False)
    for output, ids, rows in zip(outputs, prompts, want):
        check(output.prompt_logprobs, ids, rows, 2)
        [completion] = output.outputs
        assert (completion.token_ids, completion.text) == ([], "")
        assert completion.finish_reason == "length"


# ---- the model of integers: every value that a query reads changes its logits ---------------


def expected(script):
    """Log-probabilities `[prompt, VOCAB]` that the pages which each query sees give."""
    script.store(script.num_prompt)
    reads = sums(1, 0, script.digits[1, : script.num_prompt])
    rows = [logits_of(*candidates(read, place)) for place, read in enumerate(reads)]
    return torch.log_softmax(torch.stack(rows).double(), dim=-1)


def drawn_prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB - 1, size=length).tolist() for length in lengths]


@pytest.mark.parametrize("name", ["post", "frame", "bare", "exact"])
@pytest.mark.parametrize("ahead", [False, True], ids=["lockstep", "ahead"])
def test_a_likelihood_measures_the_pages_that_queries_see(name, ahead):
    """Under pressure: steps of any size, prefixes that are cached, preemptions, forks."""
    machine = CheckedEngine(formats()[name], num_bytes=460_000, seats=4, budget=150, ahead=ahead)
    base = drawn_prompts(1, [1216])[0]
    lengths = [1216, 1, 64, 700, 1152, 640]
    asked = {}
    for place, length in enumerate(lengths * 2):
        params = SamplingParams(
            n=2 if place == 3 else 1,
            temperature=0.0,
            max_tokens=30 if place % 2 else 0,
            prompt_logprobs=None if place % 3 == 2 else 3,
        )
        asked[f"r{place}"] = base[:length], params
    ended, rows = {}, []
    compare, forward = machine._compare, machine.runner.forward

    def kept(output):
        compare(output)
        if output.finished:
            ended[output.request_id] = output

    def counted(*inputs):
        rows.extend(inputs[4].rows if len(inputs) > 4 else ())
        return forward(*inputs)

    machine._compare, machine.runner.forward = kept, counted
    for request_id, (prompt, params) in asked.items():
        assert machine.submit(request_id, prompt, params)
        machine.step()
    machine.drain()
    num_wanted, preempted = 0, 0
    for request_id, (prompt, params) in asked.items():
        output = ended.pop(request_id)
        if params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
            continue
        num_wanted += len(prompt) - 1
        preempted += output.metrics.num_preemptions if not params.max_tokens else 0
        [script, *_] = scripts_of(formats()[name], request_id, prompt, params, "", ()).values()
        for place, (table, row) in enumerate(zip(output.prompt_logprobs[1:], expected(script))):
            assert len(table) in (3, 4) and prompt[place + 1] in table
            for token, entry in table.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            # all but two tokens are equally improbable
            assert set(row.topk(2).indices.tolist()) <= table.keys()
    assert not ended and len(rows) == num_wanted, "no position is computed twice"
    figures = machine.figures()
    assert preempted and figures["prefix_hit_tokens"]
    assert figures["pages_sealed"] or name == "exact"


@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_cached_tokens_change_nothing_and_are_not_taken(format):
    llm = tiny_llm(tiny_format(format) if format != "exact" else "exact")
    prompt = random_prompts([1300], seed=4)[0]
    [cold] = llm.generate([prompt], SCORE, use_tqdm=False)
    [warm] = llm.generate([prompt], SCORE, use_tqdm=False)
    assert cold.prompt_logprobs == warm.prompt_logprobs
    assert warm.metrics.num_cached_tokens == 0
    [after] = llm.generate([prompt], SamplingParams(max_tokens=2), use_tqdm=False)
    assert after.metrics.num_cached_tokens >= 1024 and after.prompt_logprobs is None


def test_a_batch_gives_what_each_prompt_gives_alone():
    llm = tiny_llm()
    prompts = random_prompts([700, 3, 513, 64, 1], seed=6)
    batch = llm.generate(prompts, SCORE, use_tqdm=False)
    for prompt, output in zip(prompts, batch):
        llm.cache.reset_prefix_cache()
        [alone] = llm.generate([prompt], SCORE, use_tqdm=False)
        for one, other in zip(output.prompt_logprobs[1:], alone.prompt_logprobs[1:]):
            assert one.keys() == other.keys()
            assert [e.logprob for e in one.values()] == pytest.approx(
                [e.logprob for e in other.values()], abs=1e-4
            )


def test_logits_of_a_prompt_are_never_all_there_at_once(monkeypatch):
    """A slice has 7 rows here; the last row of the step is that of the sampled token."""
    monkeypatch.setattr(model_runner, "SLICE_BYTES", 4 * 199 * 7)
    prompts = random_prompts([600, 45], seed=8)
    model, rows = tiny_model(), []
    want = [own_logprobs(tiny_model(), ids) for ids in prompts]
    model.lm_head.register_forward_hook(lambda *call: rows.append(call[-1].shape[-2]))
    with families.llm_of(model, kv_format="exact") as llm:
        outputs = llm.generate(prompts, SCORE, use_tqdm=False)
        assert max(rows) == 7 and sum(rows) == 599 + 44 + 2
        rows.clear()
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        assert sum(rows) == 2, "other steps compute the rows that they sample"
    for output, ids, logprobs in zip(outputs, prompts, want):
        check(output.prompt_logprobs, ids, logprobs, 2)


def test_all_tokens_and_given_tokens_have_log_probabilities():
    prompt = random_prompts([70], seed=9)[0]
    want = own_logprobs(tiny_model(), prompt)
    with tiny_llm("exact", max_logprobs=-1) as llm:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1)
        [output] = llm.generate([prompt], params, use_tqdm=False)
        check(output.prompt_logprobs, prompt, want, want.shape[-1])
        [table] = output.outputs[0].logprobs
        assert len(table) == want.shape[-1]
        params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=[5, 198, 0])
        [output] = llm.generate([prompt], params, use_tqdm=False)
    [table], [token] = output.outputs[0].logprobs, output.outputs[0].token_ids
    assert list(table) == list(dict.fromkeys([token, 5, 198, 0]))
    last = want[-1]
    for token, entry in table.items():
        assert entry.logprob == pytest.approx(float(last[token]), abs=2e-4)
        assert entry.rank == int((last > last[token]).sum()) + 1


@pytest.mark.parametrize(
    "limit, values, field",
    [
        (20, {"logprobs": 21}, "logprobs"),
        (20, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (0, {"logprobs": 1}, "logprobs"),
        (20, {"logprob_token_ids": [7, 4096]}, "logprob_token_ids"),
    ],
    ids=str,
)
def test_more_than_the_llm_allows_is_refused_by_name(limit, values, field):
    with (
        tiny_llm("exact", max_logprobs=limit) as llm,
        pytest.raises(InvalidRequestError, match=field) as caught,
    ):
        llm.generate([[1, 2]], SamplingParams(**values), use_tqdm=False)
    assert caught.value.param == field


def test_the_number_of_given_tokens_is_no_other_number():
    with pytest.raises(SamplingParamsError, match="their number") as caught:
        SamplingParams(logprob_token_ids=[1, 2], logprobs=1)
    assert caught.value.param == "logprobs"
    assert SamplingParams(logprob_token_ids=[1, 2], logprobs=2).wanted.token_ids == (1, 2)


def test_nan_in_a_prompts_logits_ends_its_request_alone(monkeypatch):
    llm = tiny_llm("exact")
    forward = llm.engine.runner.forward

    def spoiled(plan, token_ids, logit_rows, pending=None, visitor=None):
        if visitor is not None:
            visit = visitor.visit

            def with_nan(logits):
                logits[min(5, len(logits) - 1)] = float("nan")
                visit(logits)

            visitor.visit = with_nan
        return forward(plan, token_ids, logit_rows, pending, visitor)

    monkeypatch.setattr(llm.engine.runner, "forward", spoiled)
    prompts = random_prompts([30, 40], seed=2)
    params = [SCORE, SamplingParams(max_tokens=3, temperature=0.0)]
    with pytest.raises(NonFiniteError, match="prompt token 6") as caught:
        llm.generate(prompts, params, use_tqdm=False)
    failed, served = caught.value.outputs
    assert failed.error is caught.value and len(served.outputs[0].token_ids) == 3
    assert not llm.engine.requests.prompt_logprobs
