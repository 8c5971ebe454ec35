"""Requests with biases, allowed tokens and bad words: what they ask for, at no cost to others."""

from __future__ import annotations

import pytest

from spectral_paged import SamplingParams
from spectral_paged.errors import InvalidRequestError
from spectral_paged.sampling import SampledTokens
from support.fault_runs import serve, tokens
from support.served import LETTERS, served_llm
from support.tiny_model import VOCAB, raise_once, random_prompts, tiny_llm

AHEAD = pytest.mark.parametrize("ahead", [False, True])
FREE = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def copy_of(params=FREE, **values):
    clone = params.clone()
    for name, value in values.items():
        setattr(clone, name, value)
    return clone


def run(llm, prompts, params):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]


@AHEAD
def test_tokens_are_allowed_banned_and_preferred_beside_others(ahead):
    prompts = random_prompts([40, 640, 5, 70], seed=3)
    llm = tiny_llm()
    llm.engine.async_scheduling = ahead
    free = run(tiny_llm(), prompts, FREE)
    first = free[1][0]
    params = [
        FREE,
        copy_of(logit_bias={first: -100.0}),
        copy_of(allowed_token_ids=[7, 9, 11], temperature=1.0, seed=1),
        copy_of(logit_bias={13: 1000.0}),
    ]
    got = run(llm, prompts, params)
    assert got[0] == free[0], "a request without rules has its own tokens"
    assert first not in got[1] and got[1] != free[1]
    assert set(got[2]) <= {7, 9, 11} and len(set(got[2])) > 1
    assert set(got[3]) == {13}
    stats = llm.stats()
    assert stats["token_rule_rows"] == 0 and stats["lockstep_steps"] == 0


@AHEAD
def test_the_last_token_of_a_bad_word_never_follows_the_others(ahead):
    llm = served_llm()
    llm.engine.async_scheduling = ahead
    prompt = "tell me"
    free = llm.generate([prompt], FREE, use_tqdm=False)[0].outputs[0].text
    word = free[3:6]
    params = copy_of(bad_words=[word], n=3, temperature=0.3, seed=5, max_tokens=60)
    for one in (copy_of(bad_words=[word]), params):
        texts = [c.text for c in llm.generate([prompt], one, use_tqdm=False)[0].outputs]
        assert all(word not in text for text in texts)
    text = llm.generate([prompt], copy_of(bad_words=[word]), use_tqdm=False)[0].outputs[0].text
    assert text[:5] == free[:5], "only the last token of the word is banned"
    assert llm.stats()["token_rule_rows"] == 0


@AHEAD
def test_requests_that_gave_way_keep_their_rules(ahead):
    prompts = random_prompts([300, 600, 650, 700, 400, 620, 900, 560, 610], seed=5)
    params = copy_of(allowed_token_ids=list(range(40)), logit_bias={3: 1.0}, max_tokens=60)
    small, large = tiny_llm(kv_cache_bytes=700_000), tiny_llm()
    small.engine.async_scheduling = ahead
    assert run(small, prompts, params) == run(large, prompts, params)
    stats = small.stats()
    assert stats["preemptions"] > 0 and stats["token_rule_rows"] == 0


@AHEAD
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no")], ids=repr)
def test_tokens_of_a_step_that_is_taken_again_are_noted_once(monkeypatch, error, ahead):
    llms = served_llm(), served_llm()
    params = copy_of(bad_words=["ab", "zyx"], n=2, temperature=1.5, seed=3, max_tokens=9)
    for llm in llms:
        llm.engine.async_scheduling = ahead
        for i, prompt in enumerate(["some words", "x" * 600]):
            llm.engine.add_request(str(i), prompt, params)
    want, _ = serve(llms[0])
    raise_once(monkeypatch, SampledTokens, "get", error, 3)
    done, _ = serve(llms[1], type(error))
    assert tokens(done) == tokens(want) and all(o.error is None for o in done.values())


@pytest.mark.parametrize(
    "values, name",
    [
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"bad_words": ["漢"]}, "bad_words"),
        ({"bad_words": ["  "]}, "bad_words"),
    ],
)
def test_rules_over_unknown_tokens_are_refused_by_name(values, name):
    llm = served_llm()
    with pytest.raises(InvalidRequestError, match=name) as caught:
        llm.generate(["x"], SamplingParams(**values), use_tqdm=False)
    assert caught.value.param == name


def test_bad_words_without_a_tokenizer_are_refused():
    with pytest.raises(InvalidRequestError, match="bad_words need a tokenizer"):
        tiny_llm().engine.add_request("a", [1], SamplingParams(bad_words=["x"]))


@AHEAD
def test_a_request_that_allows_no_token_fails_alone(ahead):
    llm = served_llm()
    llm.engine.async_scheduling = ahead
    letter = LETTERS.index("q")
    nothing = copy_of(allowed_token_ids=[letter], bad_words=["qq"], max_tokens=5)
    llm.engine.add_request("bad", "x", nothing)
    llm.engine.add_request("good", "x", FREE)
    done, _ = serve(llm)
    assert isinstance(done["bad"].error, InvalidRequestError)
    assert "allows no token after 1 generated" in str(done["bad"].error)
    assert done["good"].error is None and len(done["good"].outputs[0].token_ids) == 12
