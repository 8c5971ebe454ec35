"""Tools over HTTP: what the template sees, what clients get, whole and in streams."""

from __future__ import annotations

import json
from functools import partial

import openai
import pytest

from spectral_paged.batch.file import OutputFile
from spectral_paged.batch.run import BatchRun
from support.served import serving, templated_llm

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function | tojson }}]{% endfor %}"
    "{% if tools %}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }} {{ c.function.arguments.city }}){% endfor %}{% endfor %}<assistant>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"enum": [{}]}}},
]
TALK = [{"role": "user", "content": "Is it warm?"}]
SAID = (
    'I look. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    ' <tool_call>{"name": "now", "arguments": {}}</tool_call>'
)


@pytest.fixture(scope="module")
def make_llm():
    return partial(templated_llm, TEMPLATE)


def create(served, stream=False, **values):
    """The message and finish reason of each choice; those of a stream put together from deltas."""
    values = {"model": "tiny", "messages": TALK, "temperature": 1.0, "seed": 2} | values
    values = {"max_tokens": 300, "tools": TOOLS} | values
    with served.client() as client:
        made = client.chat.completions.create(stream=stream, **values)
        if not stream:
            return [
                (
                    choice.message.content,
                    [
                        (c.function.name, c.function.arguments)
                        for c in choice.message.tool_calls or ()
                    ],
                    choice.finish_reason,
                )
                for choice in made.choices
            ]
        found = {}
        for chunk in made:
            for choice in chunk.choices:
                content, calls, _ = found.setdefault(choice.index, ["", {}, None])
                found[choice.index][0] += choice.delta.content or ""
                for part in choice.delta.tool_calls or ():
                    one = calls.setdefault(part.index, ["", ""])
                    one[0] += part.function.name or ""
                    one[1] += part.function.arguments or ""
                    assert part.id and part.type == "function"
                assert found[choice.index][2] is None, "nothing follows the end"
                found[choice.index][2] = choice.finish_reason
    return [
        (content or None, [tuple(calls[i]) for i in range(len(calls))], reason)
        for content, calls, reason in (found[i] for i in sorted(found))
    ]


def saying(text):
    """Let a random model say a text, by which tests choose its answer."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@STREAM
def test_calls_are_told_apart_from_what_is_said(served, stream):
    [(content, calls, reason)] = create(served, stream, **saying(SAID))
    assert content == "I look." and reason == "tool_calls"
    assert calls == [("weather", '{"city": "Rome"}'), ("now", "{}")]
    [(content, calls, _)] = create(served, stream, parallel_tool_calls=False, **saying(SAID))
    assert (content, calls) == ("I look.", [("weather", '{"city": "Rome"}')])


@STREAM
def test_text_alone_is_an_answer_as_without_tools(served, stream):
    text = "It is <b>warm</b>. "
    assert create(served, stream, **saying(text)) == [(text, [], "stop")]
    assert create(served, stream, tool_choice="none", **saying(SAID)) == [(SAID, [], "stop")]


@STREAM
def test_required_calls_have_the_schemas_of_their_tools(served, stream):
    for content, calls, reason in create(served, stream, tool_choice="required", n=3):
        assert content is None and reason == "tool_calls" and calls
        for name, arguments in calls:
            city = json.loads(arguments).get("city")
            assert (name, city) in {("weather", "Rome"), ("weather", "Oslo"), ("now", None)}


@STREAM
def test_a_named_tool_is_called_with_its_arguments(served, stream):
    choice = {"type": "function", "function": {"name": "weather"}}
    [(content, [(name, arguments)], reason)] = create(served, stream, tool_choice=choice)
    assert (content, name, reason) == (None, "weather", "stop")
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")


def test_the_template_gets_tools_calls_and_their_results(served):
    call = {"type": "function", "id": "c1", "function": {"name": "weather"}}
    call["function"]["arguments"] = '{"city": "Rome"}'
    messages = [
        *TALK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    shown = "".join(f"[{json.dumps(tool['function'])}]" for tool in TOOLS)
    text = f"{shown}<tool_call><user>Is it warm?<assistant>(weather Rome)<tool>sun<assistant>"
    values = {"model": "tiny", "messages": messages, "max_tokens": 1, "temperature": 0}
    with served.client() as client:
        used = client.chat.completions.create(tools=TOOLS, **values).usage
        bare = client.chat.completions.create(tools=TOOLS, tool_choice="none", **values).usage
    assert used.prompt_tokens == len(text)
    assert bare.prompt_tokens == len(text) - len(f"{shown}<tool_call>"), "tools are left out"


@pytest.mark.parametrize(
    "values, param, says",
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "'weather' twice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "is .sometimes.; Input should be"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "rain"}}},
            "tool_choice",
            "'rain'",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "Input should be .function."),
        (
            {"tools": [{"type": "function", "function": {"name": ""}}]},
            "tools",
            "at least 1 character",
        ),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "leave one out",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "nonsense"}},
                    }
                ],
            },
            "tools",
            "Invalid type: nonsense",
        ),
        (
            {"messages": [*TALK, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages.1.tool_calls.0.function.name",
            "a string",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "an object",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, None, "tool_calls"),
    ],
)
def test_what_no_tool_is_is_refused_by_name(served, values, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        create(served, **values)
    assert param is None or caught.value.param.startswith(param)


def test_a_template_that_shows_no_form_needs_its_name():
    with serving(templated_llm(TEMPLATE.replace("<tool_call>", ""))) as other:
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser") as caught:
            create(other)
        assert caught.value.param == "tool_choice"
        assert create(other, tool_choice="required", seed=4)[0][2] == "tool_calls"
    with serving(templated_llm("{{ messages[0].content }}")) as other:
        with pytest.raises(openai.BadRequestError, match="takes no tools") as caught:
            create(other, tool_choice="required")
        assert caught.value.param == "tools"
    with serving(templated_llm(TEMPLATE), tool_call_parser="llama3_json") as other:
        said = '{"name": "now", "parameters": {}}'
        assert create(other, **saying(said)) == [(None, [("now", "{}")], "tool_calls")]


def test_lines_of_a_batch_call_tools(tmp_path):
    body = {"messages": TALK, "tools": TOOLS, "max_tokens": 300, "temperature": 1.0, "seed": 1}
    bodies = [
        body | {"structured_outputs": {"choice": [SAID]}},
        body | {"tool_choice": "required"},
        body | {"tools": [], "max_tokens": 2},
    ]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": one}
        for i, one in enumerate(bodies)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = OutputFile(target)
    BatchRun(templated_llm(TEMPLATE), source, output).run({}, quiet=True)
    output.close()
    records = [json.loads(line) for line in target.read_text().splitlines()]
    choices = {r["custom_id"]: r["response"]["body"]["choices"][0] for r in records}
    assert choices["0"]["message"]["content"] == "I look."
    assert [c["function"]["name"] for c in choices["0"]["message"]["tool_calls"]] == [
        "weather",
        "now",
    ]
    assert choices["1"]["finish_reason"] == "tool_calls"
    assert "tool_calls" not in choices["2"]["message"]
