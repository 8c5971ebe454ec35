"""One `LLM` serves several threads at once, each with the text that it gets alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from spectral_paged import SamplingParams
from spectral_paged.errors import InvalidRequestError, SpectralPagedError
from support.served import served_llm
from support.tiny_model import random_prompts, tiny_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("num_threads", [2, 8, 20])
def test_generate_from_many_threads(num_threads):
    calls = [random_prompts([5 + 7 * i, 530 + i], seed=i) for i in range(num_threads)]
    alone = [tokens(tiny_llm().generate(prompts, GREEDY, use_tqdm=False)) for prompts in calls]
    llm = tiny_llm(max_num_seqs=4)
    ready = threading.Barrier(num_threads)

    def generate(prompts):
        ready.wait(30)
        return tokens(llm.generate(prompts, GREEDY, use_tqdm=False))

    with ThreadPoolExecutor(num_threads) as threads:
        assert list(threads.map(generate, calls, timeout=120)) == alone
    llm.cache.check_integrity()
    assert not llm.engine.has_unfinished() and not llm._callers._inboxes


def test_generate_chat_and_stream_together():
    llm = served_llm()
    talk = [{"role": "user", "content": "a word"}]
    want = (
        tokens(llm.generate(["some text"], GREEDY, use_tqdm=False)),
        tokens(llm.chat(talk, GREEDY, use_tqdm=False)),
        "".join(piece.text for piece in llm.stream("more", GREEDY)),
    )
    ready = threading.Barrier(6)

    def call(kind):
        ready.wait(30)
        if kind == 0:
            return tokens(llm.generate(["some text"], GREEDY, use_tqdm=False))
        if kind == 1:
            return tokens(llm.chat(talk, GREEDY, use_tqdm=False))
        return "".join(piece.text for piece in llm.stream("more", GREEDY))

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(call, [0, 1, 2] * 2, timeout=120))
    assert answers == list(want) * 2


def test_a_stream_gets_its_pieces_while_another_thread_generates():
    """A thread that gives the lock up and takes it again must not win every time."""
    llm = tiny_llm()
    long = SamplingParams(temperature=0.0, max_tokens=400)
    stream = llm.stream(random_prompts([9]), GREEDY)
    next(stream)
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(llm.generate, random_prompts([5] * 3), long, use_tqdm=False)
        while not llm.stats()["running"] and not working.done():
            pass
        list(stream)
        assert not working.done(), "24 tokens come before 400"
        assert [len(t) for t in tokens(working.result(60))] == [400] * 3


def test_a_refusal_in_one_thread_leaves_others_alone():
    llm = tiny_llm()

    def generate(prompt):
        return llm.generate([prompt], GREEDY, use_tqdm=False)

    with ThreadPoolExecutor(4) as threads:
        good = [threads.submit(generate, prompt) for prompt in random_prompts([4, 9, 30])]
        bad = threads.submit(generate, [])
        with pytest.raises(InvalidRequestError):
            bad.result(60)
        assert all(len(tokens(one.result(60))[0]) == 24 for one in good)


def test_a_stream_may_be_closed_by_another_thread():
    llm = tiny_llm()
    stream = llm.stream(random_prompts([9]), SamplingParams(max_tokens=400))
    next(stream)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(30)
    assert not closing.is_alive() and not llm.engine.has_unfinished()
    assert llm.generate(random_prompts([5]), GREEDY, use_tqdm=False)


def test_closing_the_llm_ends_calls_of_other_threads():
    llm = tiny_llm()
    with ThreadPoolExecutor(1) as threads:
        endless = SamplingParams(temperature=0.0, max_tokens=3000)
        working = threads.submit(llm.generate, random_prompts([5]), endless, use_tqdm=False)
        while not llm.stats()["steps"]:
            pass
        llm.close()
        with pytest.raises(SpectralPagedError, match="was closed"):
            working.result(60)
