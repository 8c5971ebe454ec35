"""Requests finish and the pool stays whole if an allocation or a seal fails for another.

The error names the request that it is about.
"""

from __future__ import annotations

import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.batch.file import BatchLine
from spectral_paged.batch.run import serve_lines
from spectral_paged.engine import sampled_step
from spectral_paged.errors import RequestFailedError
from support.fault_runs import AHEAD, FORMAT, GREEDY, PROMPTS, make_llm, queue, serve, tokens, want
from support.tiny_model import raise_once, random_prompts

# ---- allocation failures -----------------------------------------------------------------

OUT_OF_MEMORY = [MemoryError("host"), torch.cuda.OutOfMemoryError("CUDA out of memory")]


@AHEAD
@FORMAT
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["forward", "draw", "seal", "begin_step", "end_step", "append"])
def test_a_step_that_runs_out_of_memory_is_taken_again_with_fewer_tokens(
    monkeypatch, where, error, format, ahead
):
    llm = make_llm(ahead, format)
    cache_seals = llm.cache.format.seals  # else no block is ever due
    owner, name = {
        "forward": (llm.engine.runner, "forward"),
        "draw": (sampled_step, "SampledTokens"),
        "seal": (llm.cache.sealer, "seal" if cache_seals else "seal_due"),
        "begin_step": (llm.cache, "begin_step"),
        "end_step": (llm.cache, "end_step"),
        "append": (llm.cache.attention, "run"),
    }[where]
    expected = want(format)
    raise_once(monkeypatch, owner, name, error, 2)
    queue(llm)
    done, _ = serve(llm)
    assert tokens(done) == expected and all(o.error is None for o in done.values())
    assert llm.stats()["steps_out_of_memory"] == 1


@FORMAT
def test_an_allocation_may_fail_at_any_call(monkeypatch, format):
    """The k-th slot, for every k in turn; among them forks, seals and resumes under pressure."""
    params = SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=6)
    prompts = random_prompts([575, 630], seed=8)
    expected = want(format, params, prompts)
    failed = 0
    for call in (*range(1, 42, 4), 11, 12, 13, 24, 26):
        with monkeypatch.context() as patch:
            llm = make_llm(False, format, kv_cache_bytes=900_000)
            raise_once(patch, llm.cache.groups[0].arena.slots, "allocate", MemoryError("k"), call)
            queue(llm, prompts, params)
            done, _ = serve(llm)
            assert tokens(done) == expected
            failed += llm.stats()["steps_out_of_memory"]
    assert failed > 5


def test_a_seal_that_failed_is_made_up_for_before_its_page_is_wanted(monkeypatch):
    """Queries see the page whenever the rule says so, also after a step that could not seal."""
    counts = []
    for fail in (False, True):
        llm = make_llm(False)
        if fail:
            raise_once(monkeypatch, llm.cache.sealer, "seal", RuntimeError("oom"), 1)
        queue(llm, PROMPTS[:1])
        serve(llm, RuntimeError)
        counts.append(llm.stats()["pages_attended"])
    assert counts[0] == counts[1] > 0


@AHEAD
def test_memory_for_so_many_tokens_and_no_more_is_found_out(monkeypatch, ahead):
    """A device that holds 100 tokens a step: the budget comes down to that, and nobody fails."""
    llm = make_llm(ahead)
    forward = llm.engine.runner.forward

    def small(plan, *args):
        if plan.num_tokens > 100:
            raise torch.cuda.OutOfMemoryError(f"{plan.num_tokens} tokens")
        return forward(plan, *args)

    monkeypatch.setattr(llm.engine.runner, "forward", small)
    expected = want()
    queue(llm)
    done, _ = serve(llm)
    assert tokens(done) == expected
    assert 0 < llm.stats()["steps_out_of_memory"] < 20


@AHEAD
def test_a_request_that_runs_out_of_memory_alone_fails_by_name(monkeypatch, ahead):
    """Nothing helps request 2: it fails in a bounded number of steps, and the rest finish."""
    llm = make_llm(ahead)
    forward = llm.engine.runner.forward

    def greedy_one(plan, *args):
        if any(e.seq_id == "2#0" for e in plan.entries):
            raise MemoryError("no room for this one")
        return forward(plan, *args)

    monkeypatch.setattr(llm.engine.runner, "forward", greedy_one)
    expected = want()
    queue(llm)
    done, _ = serve(llm)
    error = done["2"].error
    assert error.request_id == "2" and "request '2'" in str(error)
    assert "no room for this one" in str(error)
    assert isinstance(error, RequestFailedError) and not isinstance(error, ValueError)
    del done["2"], expected["2"]
    assert tokens(done) == expected


def test_memory_that_is_gone_for_good_ends_every_request_by_name(monkeypatch):
    llm = make_llm(False)
    monkeypatch.setattr(
        llm.engine.runner, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("gone"))
    )
    with pytest.raises(RequestFailedError, match="4 of 4|request-0") as caught:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    errors = [o.error for o in caught.value.outputs]
    assert [e.request_id for e in errors] == [f"request-{i}" for i in range(4)]
    assert llm.stats()["steps"] < 60
    llm.cache.check_integrity()


def test_a_batch_line_that_runs_out_of_memory_is_a_record_of_its_own_error(monkeypatch):
    llm = make_llm(False)
    forward = llm.engine.runner.forward

    def greedy_one(plan, *args):
        if any(e.seq_id == "line-2#0" for e in plan.entries):
            raise MemoryError("gone")
        return forward(plan, *args)

    monkeypatch.setattr(llm.engine.runner, "forward", greedy_one)
    lines = [
        BatchLine(i, "", prompt=[i, 5], params=GREEDY, url="/v1/completions") for i in (1, 2, 3)
    ]
    records = {r.record["line"]: r.record["error"] for r in serve_lines(llm, iter(lines))}
    assert records.pop(2)["code"] == "RequestFailedError"
    assert records == {1: None, 3: None}


@AHEAD
@pytest.mark.parametrize("error", [RuntimeError("no"), MemoryError("no")], ids=repr)
@pytest.mark.parametrize("length, call", [(1088, 1), (1600, 2)])
def test_forks_of_a_prompt_whose_seal_raised_see_its_pages(monkeypatch, length, call, error, ahead):
    """The prompt ends where a block does, so that its seal is due when the others fork."""
    [prompt] = random_prompts([length], seed=4)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    found = []
    for fail in (False, True):
        llm = make_llm(ahead)
        with monkeypatch.context() as patch:
            if fail:
                raise_once(patch, llm.cache.sealer, "seal", error, call)
            llm.engine.add_request("0", prompt, params)
            done, _ = serve(llm, RuntimeError)
        found.append(([o.token_ids for o in done["0"].outputs], llm.stats()["pages_attended"]))
        llm.cache.check_integrity()
    assert found[0] == found[1]


def test_a_request_that_has_ended_is_not_failed_by_what_its_step_runs_into(monkeypatch):
    """Its last token is there; the memory that its step lacks then is nobody's."""
    [prompt] = random_prompts([30])
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    [said] = make_llm(True).generate([prompt], greedy, use_tqdm=False)
    stop = said.outputs[0].token_ids[4]
    for call in range(1, 10):
        llm = make_llm(True)
        params = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=[stop])
        llm.engine.add_request("0", prompt, params)
        with monkeypatch.context() as patch:
            raise_once(patch, llm.cache, "end_step", MemoryError("no"), call)
            done, _ = serve(llm)
        output, finished = done["0"], llm.stats()["finished"]
        ended = output.outputs[0].finish_reason
        assert (output.error is None) == (ended == "stop")
        assert finished == dict.fromkeys(finished, 0) | {ended: 1}
