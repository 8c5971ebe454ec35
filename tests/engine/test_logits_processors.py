"""A caller's functions change the logits of their request, and nothing of any other."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.errors import InvalidRequestError, RequestFailedError
from support.fault_runs import serve, tokens
from support.tiny_model import raise_once, random_prompts, tiny_llm

AHEAD = pytest.mark.parametrize("ahead", [False, True])
PROMPTS = random_prompts([40, 640, 5], seed=3)
FREE = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def with_processors(*processors, **values):
    params = FREE.clone()
    params.logits_processors = list(processors)
    for name, value in values.items():
        setattr(params, name, value)
    return params


def made(ahead=False):
    llm = tiny_llm()
    llm.engine.async_scheduling = ahead
    return llm


def follows(output, logits):
    """The next token is the last one plus 1: only right if all tokens so far are known."""
    wanted = output[-1] + 1 if output else 7
    return torch.full_like(logits, -1.0).index_fill_(0, torch.tensor([wanted]), 1.0)


def of_prompt(prompt, output, logits):
    logits[:] = float("-inf")
    logits[prompt[len(output)]] = 0.0
    return logits


@AHEAD
def test_each_token_is_drawn_from_what_the_functions_return(ahead):
    llm = made(ahead)
    params = [FREE, with_processors(follows), with_processors(of_prompt, max_tokens=5)]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    free, counted, copied = (
        o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)
    )
    assert free == made().generate(prompts[:1], FREE, use_tqdm=False)[0].outputs[0].token_ids
    assert counted == list(range(7, 19)) and copied == PROMPTS[2]
    assert llm.stats()["lockstep_steps"] == 0 and not llm.engine.requests.reading


def test_functions_run_in_order_before_rules_and_penalties():
    def first(output, logits):
        return torch.arange(len(logits)).float()

    def second(output, logits):
        assert logits[-1] == len(logits) - 1
        return logits

    params = with_processors(first, second, logit_bias={5: 1000.0}, max_tokens=1)
    (output,) = made().generate(PROMPTS[:1], params, use_tqdm=False)
    assert output.outputs[0].token_ids == [5]


@AHEAD
def test_siblings_have_tokens_of_their_own(ahead):
    params = with_processors(follows, n=3)
    (output,) = made(ahead).generate(PROMPTS[1:2], params, use_tqdm=False)
    assert [c.token_ids for c in output.outputs] == [list(range(7, 19))] * 3


def scaled(output, logits, scale=0.0, *more, **others):
    assert scale == 0.0
    return follows(output, logits)


def of_three(prompt, output, logits, *, shift=0):
    assert prompt == PROMPTS[2]
    return follows(output, logits)


class Counting:
    def __call__(self, output, logits):
        return follows(output, logits)


@pytest.mark.parametrize(
    "processor",
    [scaled, of_three, Counting(), partial(of_three, shift=1)],
    ids=["two", "three", "an object", "partial"],
)
def test_parameters_with_a_default_are_the_functions_own(processor):
    (output,) = made().generate(PROMPTS[2:], with_processors(processor), use_tqdm=False)
    assert output.outputs[0].token_ids == list(range(7, 19))


def broken(output, logits):
    if len(output) == 3:
        raise KeyError("no such state")
    return logits


def short(output, logits):
    return logits[:-1]


def nothing(output, logits):
    return None


def forbids_all(output, logits):
    return logits.fill_(float("-inf"))


def nan(output, logits):
    return logits.fill_(float("nan"))


@AHEAD
@pytest.mark.parametrize(
    "processor, error, says",
    [
        (broken, RequestFailedError, "no such state"),
        (short, InvalidRequestError, "must return a tensor of shape"),
        (nothing, InvalidRequestError, "returned None"),
        (forbids_all, InvalidRequestError, "allows no token"),
        (nan, InvalidRequestError, "allows no token"),
    ],
)
def test_a_function_that_fails_fails_its_request_alone(processor, error, says, ahead):
    llm = made(ahead)
    for name, params in (("a", FREE), ("bad", with_processors(processor)), ("c", FREE)):
        llm.engine.add_request(name, PROMPTS[0], params)
    done, _ = serve(llm)
    assert isinstance(done["bad"].error, error) and says in str(done["bad"].error)
    for name in "ac":
        assert done[name].error is None and len(done[name].outputs[0].token_ids) == 12


@AHEAD
def test_functions_that_fail_in_every_request_of_a_step_fail_each_by_its_own_fault(ahead):
    llm = made(ahead)
    for i in range(3):
        llm.engine.add_request(str(i), PROMPTS[0], with_processors(broken))
    done, _ = serve(llm)
    assert [len(o.outputs[0].token_ids) for o in done.values()] == [3] * 3
    assert all("no such state" in str(o.error) for o in done.values())


@AHEAD
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("call", [1, 2, 5, 6])
def test_a_function_that_fails_once_fails_its_request_alone(ahead, n, call):
    calls = []

    def fails_once(output, logits):
        calls.append(1)
        if len(calls) == call:
            raise OSError("gone for a moment")
        return logits

    llm = made(ahead)
    llm.engine.add_request("free", PROMPTS[0], FREE)
    params = with_processors(fails_once, n=n, logit_bias={5: 1.0}, presence_penalty=0.1)
    llm.engine.add_request("bad", PROMPTS[2], params)
    done, _ = serve(llm)
    assert "gone for a moment" in str(done["bad"].error)
    assert done["free"].error is None and len(done["free"].outputs[0].token_ids) == 12
    stats = llm.stats()
    assert (stats["token_rule_rows"], stats["penalty_rows"]) == (0, 0)


@AHEAD
def test_a_step_that_is_taken_again_asks_again(monkeypatch, ahead):
    llm = made(ahead)
    for i, params in enumerate([FREE, with_processors(follows)]):
        llm.engine.add_request(str(i), PROMPTS[i], params)
    raise_once(monkeypatch, llm.engine.runner, "forward", MemoryError("no"), 4)
    done, _ = serve(llm)
    assert tokens(done)["1"] == [list(range(7, 19))]


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="logits_processors is .* a list of callables"):
        SamplingParams(logits_processors=["x"])
    assert SamplingParams(logits_processors=None) == SamplingParams()
