"""Sampling parameters may be assigned and copied; each value is checked whenever it comes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.errors import SamplingParamsError
from spectral_paged.sampling import RepetitionDetectionParams, StructuredOutputsParams


def test_a_field_may_be_assigned_and_is_checked_then():
    params = SamplingParams()
    params.temperature, params.max_tokens = 0.5, np.int64(7)
    assert params == SamplingParams(temperature=0.5, max_tokens=7)
    assert type(params.max_tokens) is int
    with pytest.raises(SamplingParamsError, match="top_p is 2; it must be in"):
        params.top_p = 2
    with pytest.raises(AttributeError, match="no field 'temprature': did you mean 'temperature'"):
        params.temprature = 0.5
    assert params == SamplingParams(temperature=0.5, max_tokens=7)


def test_what_is_known_of_the_values_follows_an_assignment():
    params = SamplingParams()
    assert not (params.has_penalties or params.has_token_rules or params.changes_logits)
    params.presence_penalty = 1.0
    assert params.has_penalties and params.changes_logits and not params.has_token_rules
    params.presence_penalty, params.bad_words = 0.0, ["x"]
    assert params.has_token_rules and params.changes_logits and not params.has_penalties


def test_values_that_do_not_go_together_are_refused_when_the_params_are_copied():
    params = SamplingParams()
    params.min_tokens = 20  # max_tokens may come next
    with pytest.raises(SamplingParamsError, match="between 0 and max_tokens"):
        params.clone()
    params.max_tokens = None
    assert params.clone() == params
    params.stop, params.detokenize = "x", False
    with pytest.raises(SamplingParamsError, match="detokenize is False"):
        params.clone()


def test_a_clone_has_nothing_in_common():
    stops, biases = ["a"], {3: 1.0}
    params = SamplingParams(stop=stops, logit_bias=biases, bad_words=["b"], allowed_token_ids=[1])
    stops.append("c")
    biases[4] = 1.0
    clone = params.clone()
    params.stop.append("d")
    params.logit_bias[5] = 2.0
    params.bad_words.append("e")
    params.allowed_token_ids.append(6)
    want = SamplingParams(stop=["a"], logit_bias={3: 1.0}, bad_words=["b"], allowed_token_ids=[1])
    assert clone == want != params


@pytest.mark.parametrize(
    "name, value",
    [
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: "2"}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {"9" * 5000: 1.0}),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", ["a", ""]),
        ("bad_words", "abc"),
        ("bad_words", ["x"] * 257),
        ("bad_words", ["x" * 129]),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("repetition_detection", 5),
        ("repetition_detection", {"max_patern_size": 5}),
        ("detokenize", 1),
        ("include_stop_str_in_output", None),
        ("output_kind", 1),
    ],
)
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(SamplingParamsError, match=f"{name} is ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_forms_of_json_are_read():
    params = SamplingParams(
        logit_bias={"3": 1, np.int64(4): np.float32(0.5)},
        repetition_detection={"max_pattern_size": 3, "min_count": 2},
    )
    assert params.logit_bias == {3: 1, 4: 0.5}
    assert params.repetition_detection == RepetitionDetectionParams(3, 0, 2)
    assert SamplingParams(bad_words=None) == SamplingParams()


@pytest.mark.parametrize(
    "sizes, says",
    [
        ((-1, 0, 2), "max_pattern_size is -1"),
        ((2000, 0, 2), "max_pattern_size is 2000"),
        ((3, 4, 2), "min_pattern_size is 4"),
        ((3, 1, 1), "min_count is 1"),
        ((True, 0, 2), "max_pattern_size is True"),
    ],
)
def test_repetitions_that_cannot_be_looked_for_are_refused(sizes, says):
    with pytest.raises(SamplingParamsError, match=says) as caught:
        RepetitionDetectionParams(*sizes)
    assert caught.value.param == "repetition_detection"


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=24),
    least=st.integers(0, 3),
    more=st.integers(0, 3),
    count=st.integers(2, 4),
)
def test_an_end_that_repeats_itself_is_found_by_its_definition(tokens, least, more, count):
    most = max(1, least + more)
    want = any(
        tokens[-size * count :] == tokens[-size:] * count
        for size in range(max(1, least), most + 1)
        if size * count <= len(tokens)
    )
    assert RepetitionDetectionParams(most, least, count).ends(tokens) == want


FIELDS = {
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "logit_bias": {3: 1.0, 4: -1.0},
    "allowed_token_ids": [1, 2],
    "bad_words": ["a"],
    "logprob_token_ids": [5],
    "structured_outputs": StructuredOutputsParams(json={"enum": [1]}),
    "repetition_detection": RepetitionDetectionParams(4, 1, 2),
    "logits_processors": [len],
    "seed": 3,
}


@pytest.mark.parametrize("name", FIELDS)
def test_parameters_are_hashed_whatever_they_have(name):
    first, second = (SamplingParams(**{name: FIELDS[name]}) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert len({first, second, SamplingParams()}) == 2


@pytest.mark.parametrize("bias, meant", [(250, 100.0), (-1e5, -100.0), (99.5, 99.5)])
def test_biases_of_an_apis_request_end_at_100(bias, meant):
    assert SamplingParams.from_optional(logit_bias={"7": bias}).logit_bias == {7: meant}
    assert SamplingParams(logit_bias={7: bias}).logit_bias == {7: bias}  # as in vLLM


def test_parameters_of_an_apis_request_have_defaults_for_none():
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    assert SamplingParams.from_optional(**dict.fromkeys(names)) == SamplingParams()
    with pytest.raises(SamplingParamsError, match="logit_bias"):
        SamplingParams.from_optional(logit_bias={"x": 1})
