"""A bad prompt or conversation fails alone, for one reason, whatever door it comes by."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from spectral_paged import SamplingParams
from spectral_paged.batch.file import read_lines
from spectral_paged.batch.run import serve_lines
from spectral_paged.engine.requests import RequestGroup
from spectral_paged.errors import InvalidRequestError, RequestFailedError, SpectralPagedError
from spectral_paged.openai import CHAT_URL, COMPLETIONS_URL
from spectral_paged.sampling import StructuredOutputsParams
from spectral_paged.server.api_error import refused
from spectral_paged.server.parsing import parse_request
from spectral_paged.server.settings import ServerSettings
from support.served import letter_tokenizer, served_llm
from support.tiny_model import VOCAB, raise_once, tiny_llm

PARAMS = SamplingParams(temperature=0.0, max_tokens=3)
GOOD = "fine"
TALK = [{"role": "user", "content": GOOD}]
OUTSIDE = f"is outside the vocabulary of {VOCAB}"


@pytest.fixture(scope="module")
def llm():
    """The tokenizer knows two tokens that the model has no row for, the second special."""
    made = served_llm()
    made.get_tokenizer().add_tokens(["<extra>"])
    made.get_tokenizer().add_tokens(["<turn>"], special_tokens=True)
    assert max(made.get_tokenizer()("<extra>")["input_ids"]) >= VOCAB
    return made


# ---- doors: each serves something good as well, and returns what the bad one is told -----


def by_generate(llm, prompt, folder):
    with pytest.raises(SpectralPagedError) as caught:
        llm.generate([GOOD, prompt, GOOD], PARAMS, use_tqdm=False)
    return of_outputs(caught.value)


def by_chat(llm, messages, folder):
    with pytest.raises(SpectralPagedError) as caught:
        llm.chat([TALK, messages, TALK], PARAMS, use_tqdm=False)
    return of_outputs(caught.value)


def of_outputs(error):
    first, bad, last = error.outputs
    assert bad is None and len(first.outputs[0].token_ids) == len(last.outputs[0].token_ids) == 3
    assert error.request_id == "prompt 1"
    return str(error)


def by_stream(llm, prompt, folder):
    with pytest.raises(SpectralPagedError) as caught:
        list(llm.stream([GOOD, prompt], PARAMS))
    return str(caught.value)


def by_lines(llm, bad, good, folder):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (good, bad, good)))
    lines = read_lines(path, {"max_tokens": 3, "temperature": 0.0})
    errors = {r.record["line"]: r.record["error"] for r in serve_lines(llm, lines)}
    assert errors[1] is None and errors[3] is None
    return errors[2]["message"]


def by_line(llm, prompt, folder):
    return by_lines(llm, {"prompt": prompt}, {"prompt": GOOD}, folder)


def by_chat_line(llm, messages, folder):
    return by_lines(llm, {"messages": messages}, {"messages": TALK}, folder)


def openai_line(url, name, **body):
    return {"custom_id": name, "url": url, "body": body}


def by_openai_line(llm, prompt, folder):
    bad = openai_line(COMPLETIONS_URL, "bad", prompt=prompt)
    return by_lines(llm, bad, {"prompt": GOOD}, folder)


def by_openai_chat_line(llm, messages, folder):
    bad = openai_line(CHAT_URL, "bad", messages=messages)
    return by_lines(llm, bad, {"prompt": GOOD}, folder)


def by_server(llm, prompt, folder):
    return of_body(llm, {"prompt": prompt}, chat=False)


def by_chat_at_server(llm, messages, folder):
    return of_body(llm, {"messages": messages}, chat=True)


def of_body(llm, body, *, chat):
    with pytest.raises(InvalidRequestError) as caught:
        parse_request(llm, ServerSettings(("tiny",)), json.dumps(body).encode(), chat=chat)
    param = refused(caught.value).param
    assert param is not None and param.startswith("messages" if chat else "prompt")
    return str(caught.value)


TEXT_DOORS = [by_generate, by_stream, by_line, by_openai_line, by_server]
CHAT_DOORS = [by_chat, by_chat_line, by_openai_chat_line, by_chat_at_server]


@pytest.mark.parametrize("door", TEXT_DOORS)
@pytest.mark.parametrize(
    "prompt, says",
    [
        ("<extra>", OUTSIDE),
        ("first <extra> last", OUTSIDE),
        ([3, VOCAB], OUTSIDE),
        ([3, -1], "-1 is not a token id"),
        ("x" * 5000, "max_model_len"),
        ("", "empty"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_prompt_fails_alone_at_every_door(llm, tmp_path, door, prompt, says):
    assert says in door(llm, prompt, tmp_path)
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("door", CHAT_DOORS)
@pytest.mark.parametrize(
    "messages, says",
    [
        ("hello", "messages must be a list"),
        ({"role": "user", "content": "x"}, "messages must be a list"),
        (["hello"], "messages.0 must be an object"),
        ([*TALK, None], "messages.1 must be an object"),
        ([{"content": "x"}], "messages.0.role must be one of"),
        ([{"role": 3, "content": "x"}], "messages.0.role must be one of"),
        ([{"role": "king", "content": "x"}], "messages.0.role must be one of"),
        ([{"role": "user"}], "messages.0.content must be a string or a list of text parts"),
        ([{"role": "user", "content": None}], "messages.0.content must be a string"),
        ([{"role": "user", "content": 3}], "messages.0.content must be a string"),
        ([{"role": "user", "content": {"a": 1}}], "messages.0.content must be a string"),
        ([{"role": "user", "content": []}], "messages.0.content must be a string"),
        ([{"role": "user", "content": ["x"]}], "messages.0.content.0 must be an object"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0 is of type 'image_url'",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            "messages.0.content.0.text must be a string",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages.0 has ['tool_calls']"),
        ([{"role": "user", "content": "x", "name": 1}], "messages.0.name must be a string"),
        ([{"role": "user", "content": "<extra>"}], OUTSIDE),
        ([{"role": "assistant", "content": "x"}], "a conversation begins with the user"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_bad_conversation_fails_alone_at_every_door(llm, tmp_path, door, messages, says):
    if door is by_chat and isinstance(messages, dict):
        messages = [messages, "a list of two, whose first is a message"]
        says = "messages.1 must be an object"
    assert says in door(llm, messages, tmp_path)
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("door", CHAT_DOORS)
def test_special_tokens_in_messages_are_text_at_every_door(llm, tmp_path, monkeypatch, door):
    """The model has no row for the token, so a door where it is one refuses the conversation."""
    talk = [{"role": "user", "content": "first <turn> last"}]
    with pytest.raises((pytest.fail.Exception, TypeError)):  # there is no refusal to return
        door(llm, talk, tmp_path)
    monkeypatch.setattr(llm, "allow_special_tokens", True)
    assert OUTSIDE in door(llm, talk, tmp_path)


def test_one_call_may_allow_special_tokens(llm):
    talk = [{"role": "user", "content": "first <turn> last"}]
    assert llm.chat(talk, PARAMS, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=OUTSIDE):
        llm.chat(talk, PARAMS, use_tqdm=False, allow_special_tokens=True)


@pytest.mark.parametrize("messages", ["hello", b"hello", [], None, 3, {"role": "user"}])
def test_what_is_no_conversation_at_all_is_refused(llm, messages):
    with pytest.raises(InvalidRequestError, match="messages must be a list"):
        llm.chat(messages, PARAMS, use_tqdm=False)


def test_text_parts_are_joined_alike_at_every_door(llm, tmp_path):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    rules = {"role": "developer", "content": "Be brief"}
    talk, want = [rules, {"role": "user", "content": parts}], "<system>Be brief<user>Hi\nthere"
    chosen = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi\nthere"}]
    assert llm.chat_tokens(talk) == llm.chat_tokens(chosen)
    body = json.dumps({"messages": talk}).encode()
    parsed = parse_request(llm, ServerSettings(("tiny",)), body, chat=True)
    assert parsed.body.messages == chosen and parsed.prompts == [llm.chat_tokens(chosen)]
    path = tmp_path / "in.jsonl"
    lines = [{"messages": talk}, openai_line(CHAT_URL, "a", messages=talk)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line.messages for line in read_lines(path, {})] == [chosen, chosen], want


class Panic(BaseException):
    """What a tokenizer written in Rust raises is no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("bad text"), Panic("bad text")], ids=repr)
@pytest.mark.parametrize(
    "door, bad", [(by_generate, "!"), (by_line, "!"), (by_openai_line, "!"), (by_stream, "!")]
)
def test_an_untyped_error_of_one_request_is_its_own(monkeypatch, tmp_path, door, bad, error):
    llm, tokenizer = served_llm(), letter_tokenizer()

    class Tokenizer:
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, text):
            if text == "!":
                raise error
            return tokenizer(text)

        def decode(self, ids):
            return tokenizer.decode(ids)

    monkeypatch.setattr(llm.engine, "tokenizer", Tokenizer())
    assert "bad text" in door(llm, bad, tmp_path)
    assert not llm.engine.has_unfinished()


def test_a_request_that_cannot_be_set_up_fails_alone_and_leaves_nothing(monkeypatch):
    llm = tiny_llm()
    raise_once(monkeypatch, RequestGroup, "add_completion", AttributeError("no backend"), 2)
    with pytest.raises(RequestFailedError, match="request 'a' cannot be prepared: AttributeError"):
        llm.engine.add_request("a", [1, 2], SamplingParams(n=3))
    assert not llm.engine.has_unfinished() and not llm.engine.requests.by_sequence
    assert llm.stats()["refused"] == {"RequestFailedError": 1}
    llm.engine.add_request("a", [1, 2], SamplingParams(n=3))
    llm.engine.abort("a")


@pytest.mark.parametrize("prompts", [None, 3, b"bytes"])
def test_prompts_that_are_none_are_refused_by_name(llm, prompts):
    with pytest.raises(InvalidRequestError, match="prompts is "):
        llm.generate(prompts, PARAMS, use_tqdm=False)


@pytest.mark.parametrize("params", [3, {"max_tokens": 3}, ["x"], [{"max_tokens": 3}]], ids=repr)
def test_sampling_params_of_another_type_are_refused_by_name(llm, params):
    with pytest.raises(InvalidRequestError, match="sampling_params has "):
        llm.generate([GOOD], params, use_tqdm=False)


@pytest.mark.parametrize("seed", [-1, -7])
def test_a_negative_seed_is_none(llm, seed):
    params = SamplingParams(max_tokens=8, seed=seed)
    found = {
        tuple(o.outputs[0].token_ids) for o in llm.generate([GOOD] * 6, params, use_tqdm=False)
    }
    assert len(found) > 1
    same = SamplingParams(max_tokens=8, seed=7)
    found = {tuple(o.outputs[0].token_ids) for o in llm.generate([GOOD] * 6, same, use_tqdm=False)}
    assert len(found) == 1


FIELDS_OF_VLLM = {
    "logit_bias": {"3": 1.5},
    "allowed_token_ids": [3, 4],
    "bad_words": ["ab"],
    "include_stop_str_in_output": True,
    "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 5,
    "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
}


def test_sampling_fields_mean_the_same_at_every_door(llm, tmp_path):
    want = SamplingParams(max_tokens=3, **FIELDS_OF_VLLM)
    fields = {"max_tokens": 3, **FIELDS_OF_VLLM}
    lines = [
        {"prompt": GOOD, **fields},
        {"prompt": GOOD, "sampling_params": fields},
        openai_line(COMPLETIONS_URL, "a", prompt=GOOD, **fields),
        openai_line(CHAT_URL, "b", messages=TALK, **fields),
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = list(read_lines(path, {}))
    assert [line.params for line in read] == [want] * 4
    for chat, base in ((False, {"prompt": GOOD}), (True, {"messages": TALK})):
        body = json.dumps(base | fields).encode()
        parsed = parse_request(llm, ServerSettings(("tiny",)), body, chat=chat)
        assert parsed.params == want and len(parsed.prompts[0]) == min(5, len(parsed.prompts[0]))
    tokens = {
        tuple(result.record["outputs"][0]["token_ids"])
        for result in serve_lines(llm, iter(read[:2]))
    }
    (offline,) = llm.generate([GOOD], want, use_tqdm=False)
    assert tokens == {tuple(offline.outputs[0].token_ids)} and set(*tokens) <= {3, 4}


PERSON = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
BY_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON, "strict": True}}


@pytest.mark.parametrize(
    "field, value, form",
    [
        ("response_format", {"type": "json_object"}, {"json_object": True}),
        ("response_format", BY_SCHEMA, {"json": PERSON}),
        ("structured_outputs", {"json": PERSON}, {"json": PERSON}),
        ("structured_outputs", {"regex": "ab*", "json": None}, {"regex": "ab*"}),
    ],
)
def test_structured_outputs_mean_the_same_at_every_door(tmp_path, llm, field, value, form):
    want = StructuredOutputsParams(**form)
    lines = [
        openai_line(COMPLETIONS_URL, "a", prompt=GOOD, **{field: value}),
        openai_line(CHAT_URL, "b", messages=TALK, **{field: value}),
        {"prompt": GOOD, "structured_outputs": form},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line.params.structured_outputs for line in read_lines(path, {})] == [want] * 3
    body = json.dumps({"messages": TALK, field: value}).encode()
    parsed = parse_request(llm, ServerSettings(("tiny",)), body, chat=True)
    assert parsed.params.structured_outputs == want


@pytest.mark.parametrize("door", [by_line, by_openai_line, by_generate])
def test_a_schema_that_cannot_be_compiled_fails_alone(llm, tmp_path, door):
    bad = {"structured_outputs": {"json": {"type": "strin"}}}
    if door is by_generate:
        params = [PARAMS, replace(PARAMS, **bad), PARAMS]
        with pytest.raises(SpectralPagedError) as caught:
            llm.generate([GOOD] * 3, params, use_tqdm=False)
        told = of_outputs(caught.value)
    else:
        line = {"prompt": GOOD, **bad}
        if door is by_openai_line:
            line = openai_line(COMPLETIONS_URL, "bad", prompt=GOOD, **bad)
        told = by_lines(llm, line, {"prompt": GOOD}, tmp_path)
    assert "structured_outputs cannot be compiled: " in told and "strin" in told
