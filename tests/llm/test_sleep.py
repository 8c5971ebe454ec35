"""An LLM that sleeps gives its memory to others, and wakes up as it was."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from spectral_paged import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from spectral_paged.engine import BeamSearch
from spectral_paged.errors import (
    InvalidRequestError,
    NonFiniteError,
    PoolError,
    RequestFailedError,
    SpectralPagedError,
)
from spectral_paged.models.parked_weights import ParkedWeights
from spectral_paged.server.llm_engine import LLMEngine
from support.served import served_llm, wait_until
from support.tiny_model import raise_once, random_prompts, tiny_llm, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPTS = random_prompts([30, 700, 5], seed=1)


def tokens(llm, prompts=PROMPTS):
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs]


def page_bytes(llm):
    arenas = [group.arena for group in llm.cache.groups]
    return sum(arena.planes.untyped_storage().nbytes() for arena in arenas)


@pytest.mark.parametrize("ahead", [False, True])
def test_pages_are_free_while_it_sleeps_and_answers_are_the_same(ahead):
    llm = tiny_llm()
    llm.engine.async_scheduling = ahead
    want, held = tokens(llm), page_bytes(llm)
    for _ in range(2):
        llm.sleep()
        assert page_bytes(llm) == 0 and llm.stats()["running"] == 0
        llm.wake_up()
        assert page_bytes(llm) == held
        llm.cache.check_integrity()
        (output,) = llm.generate([PROMPTS[1]], GREEDY, use_tqdm=False)
        assert output.metrics.num_cached_tokens == 0  # forgotten
        assert tokens(llm) == want


def test_prompts_in_host_memory_stay():
    llm, long = tiny_llm(kv_host_memory="16MiB"), random_prompts([2000], seed=2)
    want = tokens(llm, long)
    llm.sleep()
    llm.wake_up()
    (output,) = llm.generate(long, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids] == want
    assert output.metrics.num_host_cached_tokens >= 512


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate(["a"], GREEDY, use_tqdm=False),
        lambda llm: llm.chat([{"role": "user", "content": "a"}], GREEDY, use_tqdm=False),
        lambda llm: list(llm.stream("a", GREEDY)),
        lambda llm: llm.beam_search(["a"], BeamSearchParams(2, 3)),
        lambda llm: llm.warm_up(),
        lambda llm: llm.engine.step(),
    ],
    ids=["generate", "chat", "stream", "beam_search", "warm_up", "step"],
)
def test_steps_are_refused_while_it_sleeps_and_nothing_is_left(call, level):
    llm = served_llm()
    llm.sleep(level)
    with pytest.raises(SpectralPagedError, match=r"sleeps .*wake_up\(\)"):
        call(llm)
    assert not llm.engine.has_unfinished()
    llm.wake_up()
    call(llm)


@pytest.mark.parametrize("level", [0, 1])
def test_prompts_may_be_queued_while_it_sleeps(level):
    llm, want = tiny_llm(), tokens(tiny_llm())
    llm.sleep(level)
    llm.enqueue(PROMPTS, GREEDY)
    llm.wake_up(["scheduling"] if level == 0 else None)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == want


@pytest.mark.parametrize("level, mode", [(0, "abort"), (1, "abort"), (1, "wait"), (0, "keep")])
def test_requests_of_others_are_aborted_finished_or_kept(level, mode):
    llm, long = tiny_llm(), SamplingParams(temperature=0.0, max_tokens=60)
    (want,) = tiny_llm().generate([PROMPTS[0]], long, use_tqdm=False)
    found = []

    def other():
        try:
            found.extend(llm.generate([PROMPTS[0]], long, use_tqdm=False))
        except SpectralPagedError as error:
            found.append(error)

    llm.enqueue([PROMPTS[0]], long)
    if mode == "keep":
        llm.sleep(level, mode)
        assert llm.engine.has_unfinished()
        llm.wake_up()
        found += llm.wait_for_completion(use_tqdm=False)
    else:
        thread = threading.Thread(target=other)
        thread.start()
        wait_until(lambda: llm.engine.counters.steps > 3 or found)
        llm.sleep(level, mode)
        thread.join(30)
        assert not llm.engine.has_unfinished()
        llm.wake_up()
    if mode == "abort":
        assert isinstance(found[0], RequestFailedError) and "falls asleep" in str(found[0])
    else:
        assert found[0].outputs[0].token_ids == want.outputs[0].token_ids


BEAMS = BeamSearchParams(3, 8)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("level, mode", [(0, "abort"), (1, "abort"), (0, "wait"), (1, "wait")])
def test_beam_searches_of_others_are_aborted_or_finished(level, mode, steps):
    llm = tiny_llm()
    (want,) = tiny_llm().beam_search([PROMPTS[1]], BEAMS)
    search = BeamSearch(llm.engine, PROMPTS[1], BEAMS)
    for _ in range(steps):
        search.step()
    llm.sleep(level, mode)
    assert search.finished and llm.cache.num_sequences == 0
    if mode == "abort":
        with pytest.raises(RequestFailedError, match="a beam search was aborted.*falls asleep"):
            search.run(llm._turns)
    else:
        assert [s.tokens for s in search.run(llm._turns)] == [s.tokens for s in want.sequences]
    llm.wake_up()
    (again,) = llm.beam_search([PROMPTS[1]], BEAMS)
    assert [s.tokens for s in again.sequences] == [s.tokens for s in want.sequences]
    llm.cache.check_integrity()


def test_a_beam_search_that_fails_while_it_is_waited_for_fails_its_caller_alone(monkeypatch):
    llm = tiny_llm()
    search = BeamSearch(llm.engine, PROMPTS[0], BEAMS)
    search.step()
    raise_once(monkeypatch, llm.engine.runner, "forward", NonFiniteError("NaN"), 2)
    llm.sleep(1, "wait")
    with pytest.raises(NonFiniteError, match="NaN"):
        search.run(llm._turns)


def test_a_beam_search_takes_no_step_while_it_sleeps():
    llm = tiny_llm()
    search = BeamSearch(llm.engine, PROMPTS[0], BEAMS)
    search.step()
    llm.sleep(0, "keep")
    with pytest.raises(SpectralPagedError, match=r"sleeps .*wake_up\(\)"):
        search.step()
    assert llm.cache.num_sequences == 0


def test_a_beam_search_in_another_thread_is_told(monkeypatch):
    llm, found = tiny_llm(), []

    def other():
        try:
            llm.beam_search(PROMPTS[:1], BeamSearchParams(2, 400))
        except RequestFailedError as error:
            found.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    wait_until(lambda: llm.cache.num_sequences == 2)
    llm.sleep()
    thread.join(30)
    assert "falls asleep" in str(found[0]) and not thread.is_alive()


@pytest.mark.parametrize(
    "level, mode, says",
    [
        (2, "abort", "level 2 drops the weights"),
        (3, "abort", "must be 0 or 1"),
        (True, "abort", "must be 0 or 1"),
        ("1", "abort", "must be 0 or 1"),
        (1, "keep", "frees their memory"),
        (1, "later", "one of abort, wait, keep"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(level, mode, says):
    llm = tiny_llm()
    with pytest.raises(InvalidRequestError, match=says):
        llm.sleep(level, mode)
    with pytest.raises(InvalidRequestError, match="tag 'graphs' is none of"):
        llm.wake_up(["graphs"])
    assert tokens(llm)


def test_it_wakes_part_by_part_and_sleeps_deeper():
    llm = tiny_llm()
    engine = LLMEngine(llm)
    llm.wake_up()  # awake already
    llm.sleep(0)
    assert engine.is_sleeping() and page_bytes(llm) > 0
    engine.sleep(1)
    engine.sleep(0)
    assert page_bytes(llm) == 0
    engine.wake_up(["weights"])
    engine.sleep(1)  # a part sleeps still, and is asleep already
    assert engine.is_sleeping() and page_bytes(llm) == 0
    engine.wake_up(["kv_cache"])
    assert not engine.is_sleeping() and tokens(llm)


def test_memory_that_is_gone_is_asked_for_again(monkeypatch):
    llm = tiny_llm()
    llm.sleep()
    arena = llm.cache.groups[0].arena
    allocate, errors = arena.allocate, [MemoryError("another program has it")]

    def flaky():
        if errors:
            raise errors.pop()
        allocate()

    monkeypatch.setattr(arena, "allocate", flaky)
    with pytest.raises(MemoryError):
        llm.wake_up()
    with pytest.raises(SpectralPagedError, match="sleeps"):
        tokens(llm)
    llm.wake_up()
    assert tokens(llm)


def test_a_model_of_two_llms_does_not_sleep_for_one():
    model = tiny_model()
    one, two = (LLM.from_model(model, kv_format="exact", kv_cache_bytes=4 << 20) for _ in "ab")
    with pytest.raises(InvalidRequestError, match="2 LLMs run this model"):
        one.sleep()
    assert tokens(one) == tokens(two)
    two.close()
    one.sleep()


def test_sequences_that_no_request_has_keep_it_awake():
    llm = tiny_llm()
    llm.cache.add_sequence("mine", num_prompt_tokens=3)
    with pytest.raises(PoolError, match="holds 1 sequences"):
        llm.sleep()
    llm.cache.free("mine")
    assert tokens(llm)


def test_closing_asleep_gives_the_model_back():
    model = tiny_model()
    llm = LLM.from_model(model, kv_format="exact", kv_cache_bytes=4 << 20)
    llm.sleep()
    llm.close()
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_parked_weights_come_back_to_the_same_tensors(monkeypatch):
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight  # tied
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.clone() for tensor in tensors]
    parked = ParkedWeights(model)
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    once = {t.untyped_storage()._cdata: t for t in tensors}
    assert parked.num_bytes >= sum(t.numel() * t.element_size() for t in once.values())
    copy, errors = torch.UntypedStorage.copy_, [MemoryError("no")]

    def flaky(self, *args):
        if errors:
            raise errors.pop()
        return copy(self, *args)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", flaky)
    with pytest.raises(MemoryError):
        parked.restore()
    parked.restore()
    parked.restore()
    for tensor, was in zip(tensors, before, strict=True):
        assert torch.equal(tensor, was)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_coroutines_wait_while_it_sleeps():
    async def run():
        engine = AsyncLLM(served_llm())

        async def one():
            return [o async for o in engine.generate("tell me", GREEDY, "a")][-1]

        await engine.sleep(1)
        assert await engine.is_sleeping()
        with pytest.raises(InvalidRequestError, match="level 2"):
            await engine.sleep(2)
        waiting = asyncio.create_task(one())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await engine.wake_up()
        output = await asyncio.wait_for(waiting, 30)
        assert not await engine.is_sleeping()
        await engine.stop()
        return output

    (want,) = served_llm().generate(["tell me"], GREEDY, use_tqdm=False)
    assert asyncio.run(run()).outputs[0].text == want.outputs[0].text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_memory_is_free_while_it_sleeps():
    model = tiny_model().cuda().bfloat16()
    llm = LLM.from_model(model, kv_format="exact", kv_cache_bytes=64 << 20)
    want, weights = tokens(llm), sum(p.nbytes for p in model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    llm.sleep()
    assert before - torch.cuda.memory_allocated() >= llm.cache.num_bytes + weights
    llm.wake_up()
    assert tokens(llm) == want  # graphs are captured again
    llm.close()
