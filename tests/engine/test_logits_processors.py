"""A caller's functions change the logits of their request, and nothing of any other."""

from __future__ import annotations

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
