"""A body's fields are served, or refused by name, at the server and in a batch file alike."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields

import jsonschema_rs
import pytest
from hypothesis import given, settings, strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from spectral_paged import SamplingParams
from spectral_paged.batch.file import read_lines
from spectral_paged.errors import InvalidRequestError, SamplingParamsError, SpectralPagedError
from spectral_paged.openai import CHAT_URL, COMPLETIONS_URL, parse_body
from spectral_paged.openai.bodies import ChatCompletionRequest, CompletionRequest, Unserved
from spectral_paged.sampling import RULES
from support.paths import ROOT

MODELS = {False: CompletionRequest, True: ChatCompletionRequest}
BASES = {False: {"prompt": "x"}, True: {"messages": [{"role": "user", "content": "x"}]}}
CHAT = pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
SCHEMAS = {chat: model.model_json_schema() for chat, model in MODELS.items()}
VALIDATORS = {chat: jsonschema_rs.validator_for(schema) for chat, schema in SCHEMAS.items()}


def choices(chat, name):
    """The values that a field which is not served may have, or None for other fields."""
    return SCHEMAS[chat]["properties"][name].get("enum")


def error_of(body, chat):
    try:
        parse_body(body, chat=chat, defaults={})
    except SpectralPagedError as error:
        return error
    return None


FIELDS = [
    pytest.param(chat, name, id=f"{'chat' if chat else 'text'}-{name}")
    for chat, model in MODELS.items()
    for name in model.model_fields
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer())
    | st.sampled_from(["", "a", "text", "none", "auto", "low", "24h", "system", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "name", "include_usage", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("chat, name", FIELDS)
@settings(max_examples=40, deadline=None, database=None)
@given(data=st.data())
def test_a_field_takes_what_its_description_says(chat, name, data):
    """The JSON schema, which the server publishes, against what is read of a body."""
    own = choices(chat, name)
    values = VALUES if own is None else VALUES | st.sampled_from(own)
    body = BASES[chat] | {name: data.draw(values)}
    if name == "stream_options":
        body["stream"] = True
    if name in ("top_logprobs", "logprob_token_ids"):
        body["logprobs"] = True if chat else 1
    if name == "min_tokens":
        body["max_tokens"] = 2**300
    said = VALIDATORS[chat].is_valid(body)
    error = error_of(body, chat)
    assert (error is None) == said, error
    if error is not None:
        assert error.param == name or error.param.startswith(f"{name}.")


UNSERVED = [field for field in FIELDS if choices(*field.values) is not None]


@pytest.mark.parametrize("chat, name", UNSERVED)
def test_no_value_is_ignored_that_asks_for_what_is_not_served(chat, name):
    own = choices(chat, name)
    for value in (False, 0, "", "x", {"a": 1}, {}, [], [0], -7, 1.5, True):
        error = error_of(BASES[chat] | {name: value}, chat)
        if any(type(one) is type(value) and one == value for one in own):
            assert error is None
        else:
            assert isinstance(error, InvalidRequestError) and error.param == name
            assert f"{name} is {value!r}, which is not supported: leave it out" in str(error)


@CHAT
@pytest.mark.parametrize("value", [None, False, 0, [], {}, "none", 1, "x"], ids=repr)
def test_an_unknown_field_is_refused_whatever_its_value(chat, value):
    error = error_of(BASES[chat] | {"temprature": value}, chat)
    assert isinstance(error, InvalidRequestError) and error.param == "temprature"
    talk = {"role": "user", "content": "x", "mood": value}
    error = error_of({"messages": [talk]}, True)
    assert isinstance(error, InvalidRequestError) and error.param == "messages.0.mood"
    part = {"type": "text", "text": "x", "mood": value}
    error = error_of({"messages": [{"role": "user", "content": [part]}]}, True)
    assert isinstance(error, InvalidRequestError) and error.param == "messages.0.content.0.mood"


@pytest.mark.parametrize("name", ["refusal", "annotations", "tool_calls", "audio", "function_call"])
def test_an_answer_may_be_sent_back_as_it_came(name):
    """OpenAI's clients write all fields of a message that they got."""
    talk = BASES[True]["messages"]
    for empty in (None, []):
        sent = [*talk, {"role": "assistant", "content": "x", name: empty}]
        assert error_of({"messages": sent}, True) is None
    for asks in ("x", {"id": "1"}, [{}], True, False, 0):
        sent = [*talk, {"role": "assistant", "content": "x", name: asks}]
        place = f"messages.1.{name}" + ".0" * (name == "tool_calls" and asks == [{}])
        assert error_of({"messages": sent}, True).param == place


@CHAT
def test_each_sampling_parameter_is_a_field_and_has_a_rule(chat):
    names = {field.name for field in fields(SamplingParams)}
    library_only = {"detokenize", "output_kind", "logits_processors"}  # vLLM's bodies have none
    assert set(RULES) == names and names - library_only <= set(MODELS[chat].model_fields)


@CHAT
def test_each_field_of_openais_client_is_known(chat):
    params = chat_create_params if chat else completion_create_params
    known = params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    assert known - MODELS[chat].model_fields.keys() == set()


def test_the_manual_lists_every_field():
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    table = text[text.index("## Fields") : text.index("## Errors")]
    said = set(re.findall(r"`(\w+)`", table))
    rows = {row.split("|")[1].strip(): row for row in re.findall(r"^\|.*", table, re.M)}
    for chat, model in MODELS.items():
        assert model.model_fields.keys() - said == set()
        for name in model.model_fields:
            own = choices(chat, name)
            if own is not None and set(map(repr, own)) == {"None"}:
                assert f"`{name}`" in rows["null only"]
            if own is not None and set(map(repr, own)) == {"None", "False"}:
                assert f"`{name}`" in rows["null or false"]
            if own is not None and set(map(repr, own)) == {"None", "True"}:
                assert f"`{name}`" in rows["null or true"]


@CHAT
def test_null_stands_for_the_default(chat):
    bare = parse_body(BASES[chat], chat=chat, defaults={"temperature": 0.5})
    nulls = dict.fromkeys(MODELS[chat].model_fields) | BASES[chat]
    assert parse_body(nulls, chat=chat, defaults={"temperature": 0.5}) == bare
    assert bare.params.temperature == 0.5 and bare.named == frozenset()


def test_given_tokens_need_logprobs_of_any_number():
    body = {"prompt": "a", "logprobs": 0, "logprob_token_ids": [3, 1]}
    params = parse_body(body, chat=False, defaults={}).params
    assert (params.logprobs, params.logprob_token_ids) == (None, [3, 1])


def test_null_stands_for_a_structural_tag_too():
    form = {"regex": "a", "structural_tag": None}
    body = {"prompt": "a", "structured_outputs": form}
    assert parse_body(body, chat=False, defaults={}).params.structured_outputs.regex == "a"
    body["structured_outputs"] = form | {"structural_tag": "x"}
    with pytest.raises(SamplingParamsError, match="structural_tag"):
        parse_body(body, chat=False, defaults={})


@CHAT
def test_values_come_through(chat):
    body = BASES[chat] | {"n": 2, "temperature": 0, "top_k": 5, "stop": "x", "seed": -1}
    body |= {"max_tokens": 9, "max_completion_tokens": 8, "cache_salt": "s", "model": "m"}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    own = {"logprobs": 3, "prompt": [[1, 2], "a"]}
    body |= {"stream": True} | ({"logprobs": True, "top_logprobs": 3} if chat else own)
    read = parse_body(body, chat=chat, defaults={"top_k": 1, "top_p": 0.5})
    wanted = SamplingParams(
        n=2, temperature=0, top_k=5, top_p=0.5, stop="x", seed=-1, max_tokens=8, logprobs=3
    )
    assert read.params == wanted and (read.model, read.cache_salt) == ("m", "s")
    assert read.stream and read.include_usage and read.continuous_usage and not read.echo
    assert read.prompts == ([] if chat else [[1, 2], "a"])
    named = {"n", "temperature", "top_k", "stop", "seed", "max_tokens", "logprobs"}
    assert read.named == named


@pytest.mark.parametrize(
    "value", [math.inf, 1e400, 10**400, True, "0", [0]], ids=lambda v: str(v)[:9]
)
def test_what_is_no_number_is_refused_by_the_rule_of_the_library(value):
    with pytest.raises(SamplingParamsError) as library:
        SamplingParams(temperature=value)
    error = error_of({"prompt": "x", "temperature": value}, False)
    assert str(error) == str(library.value) and error.param == "temperature"


@CHAT
@pytest.mark.parametrize(
    "change",
    [{"temprature": None}, {"store": True}, {"n": "2"}, {"user": 1}, {"metadata": []}],
    ids=str,
)
def test_a_batch_line_is_told_what_the_server_says(tmp_path, chat, change):
    body = BASES[chat] | change
    path = tmp_path / "in.jsonl"
    line = {"custom_id": "a", "url": CHAT_URL if chat else COMPLETIONS_URL, "body": body}
    path.write_text(json.dumps(line))
    (read,) = read_lines(path, {})
    assert str(read.error) == str(error_of(body, chat)) and read.custom_id == "a"


def test_a_batch_line_has_no_other_fields(tmp_path):
    path = tmp_path / "in.jsonl"
    line = {"custom_id": "a", "url": COMPLETIONS_URL, "body": BASES[False], "metod": "POST"}
    path.write_text(json.dumps(line))
    (read,) = read_lines(path, {})
    assert "['metod']" in str(read.error) and isinstance(read.error, InvalidRequestError)


def test_fields_that_are_not_served_have_no_value_afterwards():
    assert Unserved(store=False, vllm_xargs={}).model_dump() == dict.fromkeys(Unserved.model_fields)


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@settings(max_examples=200, deadline=None, database=None)
@given(data=st.data())
def test_a_message_of_tools_takes_what_its_description_says(data):
    """Messages with calls and results, each with one field changed or left out."""
    kind = data.draw(st.sampled_from(["assistant", "tool", "user"]))
    calls = [json.loads(json.dumps(CALL))] if kind == "assistant" else []
    message = {"role": kind, "content": "x"} | ({"tool_calls": calls} if calls else {})
    message |= {"tool_call_id": "c"} if kind == "tool" else {}
    functions = [call["function"] for call in calls]
    part = data.draw(st.sampled_from([message, *calls, *functions]))
    name = data.draw(st.sampled_from([*part, "tool_calls", "tool_call_id", "index", "mood"]))
    if data.draw(st.booleans()):
        part.pop(name, None)
    else:
        part[name] = data.draw(VALUES)
    body = {"messages": [{"role": "user", "content": "x"}, message]}
    said = VALIDATORS[True].is_valid(body)
    for function in functions:
        text = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(text, str) and text.strip() not in ("", "{}"):
            said = False  # no schema describes the JSON in a string
    error = error_of(body, True)
    assert (error is None) == said, error


@pytest.mark.parametrize("chat", [True, False])
def test_biases_end_at_100_as_in_vllm(chat):
    body = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    asked = parse_body(body | {"logit_bias": {"5": 1000, "6": -3}}, chat=chat, defaults={})
    assert asked.params.logit_bias == {5: 100.0, 6: -3}
