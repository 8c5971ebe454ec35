"""What a caller says of the chat template is heard at every door."""

from __future__ import annotations

import json

import pytest

from spectral_paged import SamplingParams
from spectral_paged.batch.file import read_lines
from spectral_paged.batch.run import serve_lines
from spectral_paged.errors import InvalidRequestError
from spectral_paged.openai import CHAT_URL
from spectral_paged.server.parsing import parse_request
from spectral_paged.server.settings import ServerSettings
from support.served import served_llm

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So it"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if mood %}[{{ mood }}]{% endif %}{% if tools %}{{ tools|length }} tools{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WHOLE = "<user>Hi</user><assistant>So it</assistant>"
PARAMS = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def llm():
    made = served_llm()
    made.get_tokenizer().chat_template = TEMPLATE
    return made


def prompt_of(llm, **options):
    (output,) = llm.chat(TALK, PARAMS, use_tqdm=False, **options)
    return llm.get_tokenizer().decode(output.prompt_token_ids)


BODIES = [
    ({}, f"{WHOLE}<assistant>"),
    ({"add_generation_prompt": False}, WHOLE),
    (
        {"add_generation_prompt": False, "continue_final_message": True},
        "<user>Hi</user><assistant>So it",
    ),
    ({"chat_template_kwargs": {"mood": "glad"}}, f"{WHOLE}[glad]<assistant>"),
]


@pytest.mark.parametrize("fields, want", BODIES, ids=str)
def test_options_mean_the_same_at_every_door(llm, tmp_path, fields, want):
    assert prompt_of(llm, **fields) == want
    body = {"messages": TALK, "max_tokens": 1, **fields}
    parsed = parse_request(llm, ServerSettings(("tiny",)), json.dumps(body).encode(), chat=True)
    assert llm.get_tokenizer().decode(parsed.prompts[0]) == want
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "url": CHAT_URL, "body": body}))
    (result,) = serve_lines(llm, read_lines(path, {}))
    usage = result.record["response"]["body"]["usage"]
    assert usage["prompt_tokens"] == len(parsed.prompts[0])


def test_a_caller_of_the_library_may_bring_a_template_and_tools(llm):
    assert prompt_of(llm, chat_template="{{ messages[0].content }}!") == "Hi!"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert "2 tools" in prompt_of(llm, tools=[tool, tool])


@pytest.mark.parametrize(
    "options, param",
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": 1}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template": 5}, "chat_template"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(llm, options, param):
    with pytest.raises(InvalidRequestError, match=param) as caught:
        prompt_of(llm, **options)
    assert caught.value.param == param
    if param != "chat_template":
        body = json.dumps({"messages": TALK, **options}).encode()
        with pytest.raises(InvalidRequestError) as caught:
            parse_request(llm, ServerSettings(("tiny",)), body, chat=True)
        assert caught.value.param == param


def test_an_option_that_does_not_exist_is_refused(llm):
    with pytest.raises(TypeError, match="chat takes no 'chat_templat'"):
        llm.chat(TALK, PARAMS, chat_templat="x")


def test_values_of_a_template_bring_no_control_token(monkeypatch):
    llm = served_llm()
    llm.get_tokenizer().chat_template = TEMPLATE
    llm.get_tokenizer().add_tokens(["<turn>"], special_tokens=True)
    plain = llm.chat_tokens(TALK, chat_template_kwargs={"mood": "a<turn>b"})
    assert max(plain) < len(llm.get_tokenizer()) - 1
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        llm.chat_tokens(TALK, chat_template_kwargs={"mood": "a<turn>b"}, allow_special_tokens=True)
