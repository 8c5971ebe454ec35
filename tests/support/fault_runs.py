"""Requests of the tiny LLM, served through steps that raise."""

from __future__ import annotations

import pytest

from spectral_paged import SamplingParams
from support.tiny_model import random_prompts, tiny_format, tiny_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
PROMPTS = random_prompts([700, 30, 1217, 575], seed=4)
AHEAD = pytest.mark.parametrize("ahead", [False, True])
FORMAT = pytest.mark.parametrize("format", ["spectral-int8", "exact"])


def queue(llm, prompts=PROMPTS, params=GREEDY):
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)


def serve(llm, tolerate=(), limit=600):
    """Step to the end: finished outputs by request, and how many steps raised `tolerate`."""
    done, raised = {}, 0
    for _ in range(limit):
        if not llm.engine.has_unfinished():
            break
        try:
            done |= {o.request_id: o for o in llm.engine.step() if o.finished}
        except tolerate:
            raised += 1
        llm.cache.check_integrity()
    assert not llm.engine.has_unfinished(), "some request never ends"
    assert llm.stats()["num_sequences"] == 0
    return done, raised


def tokens(done):
    return {i: [c.token_ids for c in o.outputs] for i, o in sorted(done.items())}


def want(format="spectral-int8", params=GREEDY, prompts=PROMPTS):
    """The tokens where nothing raises, served once for all tests that ask for the same."""
    asked = format, repr(params), str(prompts)
    if asked not in FOUND:
        llm = tiny_llm(tiny_format(format))
        queue(llm, prompts, params)
        FOUND[asked] = tokens(serve(llm)[0])
    return dict(FOUND[asked])


FOUND: dict[tuple[str, str, str], dict[str, list[list[int]]]] = {}


def make_llm(ahead, format="spectral-int8", **options):
    llm = tiny_llm(tiny_format(format), **options)
    llm.engine.async_scheduling = ahead
    return llm
