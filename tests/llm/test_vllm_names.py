"""Scripts written for vLLM run under its names, and are told what is not served."""

from __future__ import annotations

import asyncio

import pytest

import spectral_paged
from spectral_paged import (
    LLM,
    AsyncLLM,
    EngineArgs,
    LLMEngine,
    RequestOutputKind,
    SamplingParams,
)
from spectral_paged.errors import InvalidRequestError
from spectral_paged.options import LLMOptions
from support.served import served_llm
from support.tiny_model import random_prompts, tiny_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def texts(outputs):
    return [c.text for o in outputs for c in o.outputs]


def test_queued_prompts_are_completed_in_their_order():
    llm, prompts = tiny_llm(), random_prompts([30, 600, 5], seed=1)
    want = [o.outputs[0].token_ids for o in tiny_llm().generate(prompts, GREEDY, use_tqdm=False)]
    ids = llm.enqueue(prompts[:2], GREEDY) + llm.enqueue(prompts[2], GREEDY)
    assert llm.engine.counters.steps == 0 and len(set(ids)) == 3
    other = llm.generate(prompts[:1], GREEDY, use_tqdm=False)  # its steps serve them too
    assert other[0].outputs[0].token_ids == want[0]
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [o.request_id for o in outputs] == ids
    assert [o.outputs[0].token_ids for o in outputs] == want
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_a_refused_prompt_queues_nothing():
    llm = tiny_llm()
    with pytest.raises(InvalidRequestError):
        llm.enqueue([[1, 2], []], GREEDY)
    assert not llm.engine.has_unfinished() and llm.wait_for_completion() == []


def test_prefixes_are_forgotten_where_asked():
    llm, (prompt,) = tiny_llm(), random_prompts([700], seed=1)
    for reset, cached in ((False, 0), (False, 640), (True, 0)):
        if reset:
            assert llm.reset_prefix_cache() is True
        (output,) = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert (output.metrics.num_cached_tokens > 0) == (cached > 0)


@pytest.mark.parametrize("door", [LLM, EngineArgs])
@pytest.mark.parametrize(
    "given, says",
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 of vLLM is not served: one process"),
        ({"max_cpu_loras": 2}, "adapters lie on the device"),
        ({"spec_method": "ngram"}, "spec_method='ngram' of vLLM is not served: no draft model"),
        ({"max_num_seq": 2}, "did you mean 'max_num_seqs'"),
    ],
)
def test_arguments_that_ask_for_what_is_not_served_are_refused_by_name(door, given, says):
    with pytest.raises(TypeError, match=says):
        door("no such model", **given)


def test_arguments_that_ask_for_nothing_are_taken():
    given = {
        "tensor_parallel_size": 1,
        "enable_lora": False,
        "swap_space": 0,
        "load_format": "auto",
    }
    given |= {"disable_log_stats": True, "speculative_config": None}
    assert EngineArgs("m", max_num_seqs=3, **given) == EngineArgs("m", max_num_seqs=3)
    assert EngineArgs("m").options == LLMOptions()


def test_an_engine_is_run_a_step_at_a_time(monkeypatch):
    made = served_llm()
    monkeypatch.setattr("spectral_paged.server.llm_engine.LLM", lambda model, cache_options: made)
    engine = LLMEngine.from_engine_args(EngineArgs("tiny", max_num_seqs=4))
    params = GREEDY.clone()
    params.output_kind = RequestOutputKind.FINAL_ONLY
    assert engine.add_request("0", "tell me", params) == "0"
    engine.add_request("1", {"prompt": "again"}, GREEDY)
    engine.add_request("2", "gone", GREEDY)
    assert engine.get_num_unfinished_requests() == 3
    engine.abort_request("2")
    seen = []
    while engine.has_unfinished_requests():
        seen += engine.step()
    assert [o.request_id for o in seen].count("0") == 1
    assert [o.request_id for o in seen].count("1") == 6
    done = {o.request_id: o for o in seen if o.finished}
    want = served_llm().generate(["tell me", "again"], GREEDY, use_tqdm=False)
    assert texts([done["0"], done["1"]]) == texts(want)


@pytest.mark.parametrize("kind", RequestOutputKind)
@pytest.mark.parametrize("n", [1, 2])
def test_coroutines_get_outputs_of_their_kind(kind, n):
    params = SamplingParams(temperature=1.0, seed=3, n=n, max_tokens=8, logprobs=1, stop="qq")
    want = served_llm().generate(["tell me", "again"], params, use_tqdm=False)
    params.output_kind = kind

    async def one(engine, name, prompt):
        return [output async for output in engine.generate(prompt, params, name)]

    async def run():
        engine = AsyncLLM(served_llm())
        found = await asyncio.gather(one(engine, "a", "tell me"), one(engine, "b", "again"))
        assert await engine.reset_prefix_cache()
        await engine.stop()
        return found

    for name, outputs, whole in zip("ab", asyncio.run(run()), want, strict=True):
        assert {o.request_id for o in outputs} == {name}
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        if kind is RequestOutputKind.DELTA:
            for completion in whole.outputs:
                mine = [c for o in outputs for c in o.outputs if c.index == completion.index]
                assert "".join(c.text for c in mine) == completion.text
                assert sum((c.token_ids for c in mine), []) == completion.token_ids
                tables = sum((c.logprobs for c in mine), [])
                assert [sorted(t) for t in tables] == [sorted(t) for t in completion.logprobs]
                assert mine[-1].finish_reason == completion.finish_reason
        else:
            for got, completion in zip(outputs[-1].outputs, whole.outputs, strict=True):
                assert (got.text, got.token_ids) == (completion.text, completion.token_ids)
                assert got.finish_reason == completion.finish_reason
                assert [sorted(t) for t in got.logprobs] == [sorted(t) for t in completion.logprobs]
            assert len(outputs) == 1 or kind is RequestOutputKind.CUMULATIVE
            for before, after in zip(outputs, outputs[1:]):
                for old, new in zip(before.outputs, after.outputs):
                    assert new.text.startswith(old.text)
                    assert new.token_ids[: len(old.token_ids)] == old.token_ids


def test_coroutines_are_refused_and_aborted_alone():
    async def run():
        engine = AsyncLLM(served_llm())
        long = SamplingParams(max_tokens=500, temperature=0.0)

        async def aborted():
            with pytest.raises(InvalidRequestError, match="'gone' was aborted"):
                async for output in engine.generate("tell me", long, "gone"):
                    assert not output.finished
                    await engine.abort("gone")

        with pytest.raises(Exception, match="is empty"):
            await anext(engine.generate("", GREEDY, "bad"))
        with pytest.raises(InvalidRequestError, match="request_id"):
            await anext(engine.generate("x", GREEDY, ""))
        outputs = engine.generate("again", GREEDY, "good")
        first = await anext(outputs)
        await aborted()
        last = [first, *[output async for output in outputs]][-1]
        await engine.abort("nobody")
        await engine.stop()
        assert not engine.llm.engine.has_unfinished()
        return last

    last = asyncio.run(run())
    assert last.finished and len(last.outputs[0].token_ids) == 6


def test_public_names_are_found():
    for name in spectral_paged.__all__:
        assert getattr(spectral_paged, name).__name__ == name
