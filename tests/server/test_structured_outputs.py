"""The server's answers have the form that a body asks for, and others' answers come meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import openai
import pydantic
import pytest

from spectral_paged.grammar import GrammarCompiler
from support.served import VALUES

SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["ann", "bob"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["who"],
    "additionalProperties": False,
}
TALK = [{"role": "user", "content": "x"}]


class Answer(pydantic.BaseModel):
    who: str = pydantic.Field(pattern="^[ab]{3}$")
    sure: bool


def test_a_class_of_openais_client_is_parsed(served):
    made = served.client().chat.completions.parse(
        model="tiny", messages=TALK, response_format=Answer, temperature=1.0, seed=3
    )
    assert isinstance(made.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_in_whole_answers_and_in_streams(served, stream):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    made = served.client().chat.completions.create(
        messages=TALK,
        response_format=form,
        stream=stream,
        max_tokens=300,
        logit_bias={"0": -50},  # spaces, of which a random model has no end
        **VALUES,
    )
    if stream:
        text = "".join(c.choices[0].delta.content or "" for c in made)
    else:
        text = made.choices[0].message.content
    assert json.loads(text)["who"] in ("ann", "bob")


def test_choices_come_by_vllms_field(served):
    made = served.client().completions.create(
        prompt="x", n=2, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **VALUES
    )
    assert {choice.text for choice in made.choices} <= {"yes", "no"}


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strin"}},
                }
            },
            "response_format",
        ),
        ({"structured_outputs": {"json": {"type": "strin"}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_a_form_that_cannot_be_served_is_a_400_that_says_why(served, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(messages=TALK, extra_body=fields, **VALUES)
    assert caught.value.param.endswith(param)
    served.settle()


def test_others_are_served_while_a_schema_is_compiled(monkeypatch, served):
    go_on = threading.Event()
    compile_now = GrammarCompiler._compile

    def slow(self, asked):
        if asked.regex == "slow":
            go_on.wait(20)
        return compile_now(self, asked)

    monkeypatch.setattr(GrammarCompiler, "_compile", slow)
    client = served.async_client()

    async def run():
        late = asyncio.create_task(
            client.completions.create(
                prompt="x", extra_body={"structured_outputs": {"regex": "slow"}}, **VALUES
            )
        )
        begin = time.monotonic()
        plain = await client.completions.create(prompt="x", max_tokens=2, **VALUES)
        quick = await client.completions.create(
            prompt="x", extra_body={"structured_outputs": {"regex": "fast"}}, **VALUES
        )
        took = time.monotonic() - begin
        assert not late.done()
        go_on.set()
        return plain, quick, await late, took

    plain, quick, late, took = asyncio.run(run())
    assert quick.choices[0].text == "fast" and late.choices[0].text == "slow" and took < 5
    assert plain.usage.completion_tokens == 2
    served.settle()
