"""`/v1/responses` as OpenAI's client sends and reads it; nothing is stored."""

from __future__ import annotations

import json
from functools import partial

import openai
import pydantic
import pytest

from spectral_paged import SamplingParams
from support.served import templated_llm

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% if tools %}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }} {{ c.function.arguments.city }}){% endfor %}{% endfor %}<assistant>"
)
TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    }
]
GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 9}


@pytest.fixture(scope="module")
def make_llm():
    return partial(templated_llm, TEMPLATE)


INPUTS = [
    ("Hello", None, "<user>Hello<assistant>"),
    ([{"role": "user", "content": "Hello"}], "Be brief", "<system>Be brief<user>Hello<assistant>"),
    (
        [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b", "annotations": []}],
            },
            {
                "type": "function_call",
                "call_id": "c",
                "name": "weather",
                "arguments": '{"city": "Rome"}',
            },
            {"type": "function_call_output", "call_id": "c", "output": "sun"},
        ],
        None,
        "<user>a<assistant>b(weather Rome)<tool>sun<assistant>",
    ),
]


@pytest.mark.parametrize("given, instructions, prompt", INPUTS, ids=["text", "message", "items"])
def test_an_input_is_the_conversation_that_it_spells(
    client, reference, given, instructions, prompt
):
    made = client.responses.create(input=given, instructions=instructions, **GREEDY)
    params = SamplingParams(temperature=0.0, max_tokens=9)
    [want] = reference.generate([prompt], params, use_tqdm=False)
    assert made.output_text == want.outputs[0].text
    assert made.usage.input_tokens == len(prompt) and made.usage.output_tokens == 9
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.id.startswith("resp_") and made.model == "tiny"


def test_a_stream_has_the_events_of_its_response(client):
    whole = client.responses.create(input="Hello", **GREEDY)
    with client.responses.create(input="Hello", stream=True, **GREEDY) as stream:
        events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    last = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[-4:] == last
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-4].text == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_functions_are_called_with_valid_arguments(client, stream):
    choice = {"type": "function", "name": "weather"}
    values = {"model": "tiny", "input": "warm?", "temperature": 1.0, "tools": TOOLS}
    made = client.responses.create(tool_choice=choice, stream=stream, **values)
    if stream:
        events = list(made)
        made = events[-1].response
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert [e.arguments for e in done] == [item.arguments for item in made.output]
    [call] = made.output
    assert (call.type, call.name, made.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo") and call.call_id
    again = [{"role": "user", "content": "warm?"}, call.model_dump(exclude_none=True)]
    again[1].pop("status")
    again.append({"type": "function_call_output", "call_id": call.call_id, "output": "sun"})
    client.responses.create(input=again, **GREEDY)


def test_a_class_of_openais_client_is_parsed(client):
    class Answer(pydantic.BaseModel):
        sure: bool

    made = client.responses.parse(
        model="tiny", input="x", text_format=Answer, temperature=1.0, max_output_tokens=200
    )
    assert isinstance(made.output_parsed, Answer)


@pytest.mark.parametrize(
    "values, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0"),
        ({"input": [{"role": "king", "content": "x"}]}, "input.0.role"),
        ({"input": "a" * 9000}, "input"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}},
            "text.format",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_served_is_refused_by_its_own_name(client, values, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": "tiny", "input": "x"} | values))
    assert caught.value.param == param
