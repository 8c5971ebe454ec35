"""Beam search finds what a search over whole recomputed sequences finds, over forks."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.errors import (
    CapacityError,
    InvalidRequestError,
    NonFiniteError,
    SamplingParamsError,
)
from spectral_paged.sampling import BeamSearchParams
from support.served import served_llm
from support.tiny_model import raise_once, random_prompts, tiny_format, tiny_llm, tiny_model


def search(model, prompt, params, eos=()):
    """vLLM's definition, every sequence computed anew: `(tokens, sum of log-probabilities)`."""

    def score(found):
        tokens, total = found
        return total / (len(tokens) - (tokens[-1] in eos)) ** params.length_penalty

    beams, ended = [(list(prompt), 0.0)], []
    for _ in range(params.max_tokens):
        going = []
        for tokens, total in beams:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[0, -1].float()
            top = torch.log_softmax(logits, -1).topk(2 * params.beam_width)
            for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                found = ([*tokens, token], total + value)
                (ended if token in eos and not params.ignore_eos else going).append(found)
        beams = sorted(going, key=score, reverse=True)[: params.beam_width]
    return sorted([*ended, *beams], key=score, reverse=True)[: params.beam_width]


def exact_llm(eos=(), **options):
    llm = tiny_llm(tiny_format("exact"), **options)
    llm.engine.eos_token_ids = eos
    return llm


@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize(
    "values",
    [
        {"beam_width": 1},
        {"beam_width": 3},
        {"beam_width": 4, "length_penalty": 0.0},
        {"beam_width": 3, "ignore_eos": True},
    ],
    ids=str,
)
def test_sequences_are_those_of_the_definition(length, values):
    (prompt,) = random_prompts([length], seed=length)
    params = BeamSearchParams(max_tokens=7, **values)
    model = tiny_model()
    free = search(model, prompt, params)
    eos = (free[0][0][-3],)  # a token that comes up on the way
    want = search(model, prompt, params, eos)
    llm = exact_llm(eos)
    (output,) = llm.beam_search([prompt], params)
    assert [found.tokens for found in output.sequences] == [tokens for tokens, _ in want]
    for found, (tokens, total) in zip(output.sequences, want, strict=True):
        assert found.cum_logprob == pytest.approx(total, abs=1e-3)
        assert len(found.logprobs) == len(tokens) - length
        ended = not params.ignore_eos and tokens[-1] in eos
        assert found.finish_reason == ("stop" if ended else "length")
    assert llm.stats()["num_sequences"] == 0
    llm.cache.check_integrity()


def test_beams_share_what_they_have_in_common():
    """A prompt of many slots is held once, and pages are read through forks."""
    llm = tiny_llm(kv_cache_bytes=1_200_000, max_num_seqs=8)
    (prompt,) = random_prompts([900], seed=1)
    params = BeamSearchParams(beam_width=6, max_tokens=5)
    assert 6 * len(prompt) > llm.stats()["max_sequence_tokens"]
    (output,) = llm.beam_search(prompt, params)
    assert len({tuple(found.tokens) for found in output.sequences}) == 6
    assert llm.stats()["pages_attended"] > 0


def test_other_callers_go_on_in_between():
    llm, alone = tiny_llm(), tiny_llm()
    long = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    prompts = random_prompts([40, 600], seed=2)
    (want,) = alone.generate(prompts[:1], long, use_tqdm=False)
    llm.engine.add_request("a", prompts[0], long)
    for _ in range(3):
        llm.engine.step()
    (output,) = llm.beam_search(prompts[1], BeamSearchParams(3, 6))
    done = {}
    while llm.engine.has_unfinished():
        done |= {o.request_id: o for o in llm.engine.step()}
    assert done["a"].outputs[0].token_ids == want.outputs[0].token_ids
    (same,) = alone.beam_search(prompts[1], BeamSearchParams(3, 6))
    assert [f.tokens for f in output.sequences] == [f.tokens for f in same.sequences]


def test_text_is_that_of_prompt_and_output():
    (output,) = served_llm().beam_search("tell me", BeamSearchParams(2, 4))
    for found in output.sequences:
        assert found.text.startswith("tell me") and len(found.text) == 11


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("where", ["forward", "fork", "end_step"])
def test_a_search_that_fails_leaves_nothing(monkeypatch, where, call):
    llm = tiny_llm()
    owner = llm.engine.runner if where == "forward" else llm.cache
    raise_once(monkeypatch, owner, where, MemoryError("no"), call)
    with pytest.raises(MemoryError):
        llm.beam_search(random_prompts([700], seed=1), BeamSearchParams(3, 6))
    assert llm.stats()["num_sequences"] == 0
    llm.cache.check_integrity()
    assert llm.beam_search([[1, 2]], BeamSearchParams(2, 3))


def test_beams_without_a_seat_or_room_are_refused():
    llm = tiny_llm(max_num_seqs=2)
    with pytest.raises(CapacityError, match="no room for .* beams of 3"):
        llm.beam_search([[1, 2, 3]], BeamSearchParams(3, 6))
    assert llm.stats()["num_sequences"] == 0
    with pytest.raises(InvalidRequestError, match="pinned_spans"):
        llm.beam_search({"prompt_token_ids": [1], "pinned_spans": [(0, 1)]}, BeamSearchParams(2, 2))


def test_nan_is_told(monkeypatch):
    llm = tiny_llm()
    forward = llm.engine.runner.forward
    monkeypatch.setattr(llm.engine.runner, "forward", lambda *a: forward(*a) * float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        llm.beam_search([[1, 2, 3]], BeamSearchParams(2, 2))


@pytest.mark.parametrize(
    "values",
    [
        {"beam_width": 0},
        {"beam_width": True},
        {"beam_width": 10**4},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"temperature": 0.5},
        {"ignore_eos": 1},
        {"length_penalty": "x"},
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(values):
    (name,) = values
    with pytest.raises(SamplingParamsError, match=f"{name} is ") as caught:
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | values))
    assert caught.value.param == name
