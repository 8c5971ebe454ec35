"""Steps queued before the previous one's tokens are known give the same tokens and endings."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.cache.sealer import SealCheck
from spectral_paged.engine import sampled_step
from spectral_paged.errors import NonFiniteError
from spectral_paged.sampling import SampledTokens
from support.tiny_model import raise_once, random_prompts, tiny_format, tiny_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LENGTHS = [1, 63, 64, 65, 575, 576, 577, 640, 700, 1087, 1088, 1152, 1217, 1500]


def both(prompts, params, **options):
    """Outputs in lockstep and with steps queued ahead, each from an engine of its own."""
    found = []
    for ahead in (False, True):
        llm = tiny_llm(**options)
        llm.engine.async_scheduling = ahead
        found.append(llm.generate(prompts, params, use_tqdm=False))
        llm.cache.check_integrity()
        assert llm.stats()["num_sequences"] == 0 and not llm.engine.has_unfinished()
    return found[0], found[1], llm.stats()


def completions(outputs):
    return [[(c.token_ids, c.finish_reason, c.stop_reason) for c in o.outputs] for o in outputs]


@pytest.mark.parametrize("budget", [64, 8192])
@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_queued_steps_say_the_same(format, budget):
    options = {"format": tiny_format(format), "max_num_batched_tokens": budget}
    want, got, stats = both(random_prompts(LENGTHS), GREEDY, **options)
    assert completions(got) == completions(want)
    assert stats["async_scheduling"] and stats["lockstep_steps"] == 0


@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_a_full_pool_preempts_queued_steps_and_changes_no_token(format):
    prompts = random_prompts([300, 600, 650, 700, 400, 620, 900, 560, 610], seed=5)
    small = 1_100_000 if format == "exact" else 700_000
    want, got, stats = both(
        prompts,
        SamplingParams(temperature=0.0, max_tokens=90),
        format=tiny_format(format),
        kv_cache_bytes=small,
    )
    assert stats["preemptions"] > 0 and completions(got) == completions(want)


def test_every_kind_of_ending_comes_at_the_same_token():
    prompts = random_prompts([30, 30, 700, 64, 5], seed=8)
    free = tiny_llm().generate(prompts[0], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[free[4]]),
        SamplingParams(temperature=1.0, seed=3, max_tokens=9),
        SamplingParams(temperature=1.0, seed=4, max_tokens=40, min_tokens=20, stop_token_ids=[7]),
        SamplingParams(temperature=0.0, max_tokens=1),
        SamplingParams(temperature=0.8, seed=1, max_tokens=200, logprobs=2),
    ]
    want, got, _ = both(prompts, params, max_model_len=720)
    assert completions(got) == completions(want)
    assert {c.finish_reason for o in got for c in o.outputs} == {"stop", "length"}
    tables = [[sorted(t) for t in out[4].outputs[0].logprobs] for out in (got, want)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("seats", [1, 32])
def test_siblings_start_from_tokens_that_are_known(seats):
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=11)
    want, got, stats = both(random_prompts([639, 10], seed=4), params, max_num_seqs=seats)
    assert completions(got) == completions(want) and stats["lockstep_steps"] > 0


def test_penalties_go_ahead():
    params = SamplingParams(temperature=0.0, max_tokens=20, frequency_penalty=1.5)
    want, got, stats = both(random_prompts([50, 600], seed=2), params)
    assert completions(got) == completions(want)
    assert stats["lockstep_steps"] == 0


def test_an_abort_between_steps_drops_the_token_on_its_way():
    llm = tiny_llm()
    llm.engine.async_scheduling = True
    prompts = random_prompts(LENGTHS)
    want = tiny_llm().generate([prompts[8]], GREEDY, use_tqdm=False)
    for name, i in (("stays", 8), ("goes", 10)):
        llm.engine.add_request(name, prompts[i], GREEDY)
    for _ in range(3):
        llm.engine.step()
    llm.engine.abort("goes")
    llm.engine.add_request("goes", prompts[2], GREEDY)  # the name may be used again at once
    done = {}
    while llm.engine.has_unfinished():
        done |= {o.request_id: o for o in llm.engine.step()}
    assert completions([done["stays"]]) == completions(want)
    again = tiny_llm().generate([prompts[2]], GREEDY, use_tqdm=False)
    assert completions([done["goes"]]) == completions(again)
    llm.cache.check_integrity()


def test_nan_fails_its_request_and_no_other():
    prompts = [[t or 1 for t in p] for p in random_prompts([30, 700, 60], seed=6)]
    prompts[1][100] = 0
    want = tiny_llm().generate([prompts[0], prompts[2]], GREEDY, use_tqdm=False)
    llm = tiny_llm()
    llm.engine.async_scheduling = True
    with torch.no_grad():
        llm.engine.runner.model.model.embed_tokens.weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or Inf") as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    outputs = caught.value.outputs
    assert completions([outputs[0], outputs[2]]) == completions(want)
    assert llm.stats()["num_sequences"] == 0
    llm.cache.check_integrity()


# ---- what is interrupted can go on -------------------------------------------------------


def serve(llm, tolerate):
    """Outputs of everything queued, steps that raise `tolerate` taken again."""
    done, raised = {}, 0
    for _ in range(400):
        if not llm.engine.has_unfinished():
            break
        try:
            done |= {o.request_id: o for o in llm.engine.step()}
        except tolerate:
            raised += 1
    assert not llm.engine.has_unfinished(), "some request never ends"
    llm.cache.check_integrity()
    assert llm.stats()["num_sequences"] == 0
    return done, raised


def test_a_failing_forward_keeps_what_was_sampled_before(monkeypatch):
    llm = tiny_llm()
    llm.engine.async_scheduling = True
    prompt = random_prompts([700])[0]
    want = tiny_llm().generate([prompt], GREEDY, use_tqdm=False)
    raise_once(monkeypatch, llm.engine.runner, "forward", RuntimeError("out of memory"), 5)
    llm.engine.add_request("a", prompt, GREEDY)
    done, raised = serve(llm, RuntimeError)
    assert raised == 1 and completions([done["a"]]) == completions(want)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize(
    "where, error",
    [("get", KeyboardInterrupt()), ("draw", RuntimeError("oom")), ("seal", RuntimeError("oom"))],
)
def test_a_step_that_raises_anywhere_can_be_taken_again(monkeypatch, where, error, call, ahead):
    prompts = random_prompts([700, 30], seed=4)
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=8)
    want = tiny_llm().generate(prompts, params, use_tqdm=False)
    llm = tiny_llm()
    llm.engine.async_scheduling = ahead
    if where == "get":
        raise_once(monkeypatch, SampledTokens, "get", error, call)
    elif where == "draw":
        raise_once(monkeypatch, sampled_step, "SampledTokens", error, call)
    else:
        raise_once(monkeypatch, llm.cache.sealer, "seal", error, call)
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    done, raised = serve(llm, type(error))
    assert raised == 1 and completions([done["0"], done["1"]]) == completions(want)


def test_a_request_that_ended_before_a_step_raised_is_returned_by_the_next(monkeypatch):
    """Siblings start in the step before: its tokens are handed out before the next one raises."""
    llm = tiny_llm()
    llm.engine.async_scheduling = True
    raise_once(monkeypatch, llm.engine.runner, "forward", RuntimeError("oom"), 5)
    llm.engine.add_request("short", [4, 5], SamplingParams(temperature=0.0, max_tokens=4))
    for _ in range(3):
        llm.engine.step()
    slow = SamplingParams(n=2, temperature=0.0, max_tokens=12)
    llm.engine.add_request("slow", [1, 2, 3], slow)
    llm.engine.step()
    short = llm.engine.requests.by_id["short"]
    with pytest.raises(RuntimeError, match="oom"):
        llm.engine.step()
    assert short.finished
    done, raised = serve(llm, RuntimeError)
    assert raised == 0 and set(done) == {"slow", "short"}


def test_what_is_found_of_an_ended_request_fails_no_other_of_its_name(monkeypatch):
    """As on CUDA, where a check is known later: the aborted request's NaN is nobody else's."""
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: False))
    llm = tiny_llm()
    llm.engine.async_scheduling = True
    embedding = llm.engine.runner.model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[0] = float("inf")
    prompt = [t or 1 for t in random_prompts([1300], seed=6)[0]]
    spoiled = list(prompt)
    spoiled[100] = 0
    llm.engine.add_request("a", spoiled, GREEDY)
    llm.engine.step()
    llm.engine.abort("a")
    llm.engine.add_request("a", prompt, GREEDY)
    done, _ = serve(llm, ())
    assert done["a"].error is None and done["a"].outputs[0].finish_reason == "length"


def test_forks_share_what_is_sealed_ahead():
    """600 + 60 tokens: a block completes, is sealed ahead once, and counts once for all of them."""
    for n in (1, 3):
        llm = tiny_llm()
        params = SamplingParams(n=n, temperature=1.0, seed=1, max_tokens=60)
        out = llm.generate(random_prompts([600]), params, use_tqdm=False)[0]
        assert out.metrics.num_pages_sealed == llm.cache.counters.pages_sealed == 2
        llm.cache.check_integrity()


class Keeper:
    """A logits processor, by which it is seen whether somebody keeps its request."""

    def __call__(self, tokens, logits):
        return logits


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("ending", ["finished", "aborted", "failed"])
def test_an_engine_without_requests_keeps_none_alive(ahead, ending, monkeypatch):
    llm = tiny_llm()
    engine = llm.engine
    engine.async_scheduling = ahead
    params = SamplingParams(temperature=0.0, max_tokens=5)
    params.logits_processors = [Keeper()]
    kept = weakref.ref(params.logits_processors[0])
    engine.add_request("a", random_prompts([70])[0], params)
    del params
    for _ in range(3):
        engine.step()
    assert kept() is not None
    if ending == "aborted":
        engine.abort("a")
    elif ending == "failed":
        monkeypatch.setattr(SampledTokens, "get", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        engine.abort("a")
    else:
        while engine.has_unfinished():
            engine.step()
    gc.collect()
    assert kept() is None
