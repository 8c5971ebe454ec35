"""Tool calls are read from text in the forms of model families, however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings, strategies as st

from spectral_paged.openai import FORMS, ForcedReader, ToolCall, ToolCallReader
from spectral_paged.openai.tool_calls import forced_schema, form_of

WEATHER = {"city": "Köln", "days": [1, 2], "note": 'a </tool_call> [TOOL_CALLS] }{ " \\ ;'}


def call(name, arguments, key="arguments"):
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def read(form, pieces, **options):
    """The content and the calls, `(name, arguments)`, of a text in pieces."""
    reader = ToolCallReader(form, **options)
    items = [item for piece in pieces for item in reader.read(piece)]
    items += reader.read("", end=True)
    calls = [(c.name, json.loads(c.arguments)) for c in items if isinstance(c, ToolCall)]
    return "".join(item for item in items if isinstance(item, str)), calls


TWO = [("weather", WEATHER), ("now", {})]
EXAMPLES = [
    ("hermes", "Hello <b> there.\n", "Hello <b> there.\n", []),
    (
        "hermes",
        f"I look.\n<tool_call>\n{call('weather', WEATHER)}\n</tool_call>\n"
        f"<tool_call>{call('now', {})}</tool_call>\n",
        "I look.",
        TWO,
    ),
    ("hermes", f"<tool_call>{call('weather', WEATHER)}", "", TWO[:1]),  # without its end
    ("hermes", "a <tool_call>{no json}</tool_call> b", "a <tool_call>{no json}</tool_call> b", []),
    ("hermes", '<tool_call>{"nam": 1}</tool_call>', '<tool_call>{"nam": 1}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    ("hermes", "<tool_cal", "<tool_cal", []),
    ("llama3_json", call("weather", WEATHER, "parameters"), "", TWO[:1]),
    (
        "llama3_json",
        f" {call('weather', WEATHER, 'parameters')}; {call('now', {}, 'parameters')}",
        "",
        TWO,
    ),
    ("llama3_json", f"<|python_tag|>{call('now', {})}", "", TWO[1:]),
    ("llama3_json", f"See {call('now', {})}", f"See {call('now', {})}", []),
    ("llama3_json", '{"a": 1} is JSON', '{"a": 1} is JSON', []),
    ("llama3_json", "{x} is a set", "{x} is a set", []),
    (
        "mistral",
        f"Well [TOOL_CALLS] [{call('weather', WEATHER)}, {call('now', {})}]",
        "Well",
        TWO,
    ),
    ("mistral", f"[TOOL_CALLS]weather{json.dumps(WEATHER)}[TOOL_CALLS]now[ARGS]{{}}", "", TWO),
    ("mistral", "[TOOL_CALLS] none of it", "[TOOL_CALLS] none of it", []),
    ("mistral", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]", []),
    ("mistral", "a [TOOL_CALL", "a [TOOL_CALL", []),
]


@pytest.mark.parametrize("form, text, content, calls", EXAMPLES)
def test_calls_and_content_are_told_apart(form, text, content, calls):
    assert read(form, [text]) == (content, calls)
    assert read(form, text) == (content, calls), "a character at a time"
    assert read(form, [text], parallel=False) == (content, calls[:1])


PARTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "[",
        "]",
        "{",
        "}",
        ";",
        '"',
    ),
    *(" ", "\n", "a", "<", "f", call("f", {"a": 1}), call("g", {}, "parameters"), "f{}", ", "),
]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_cut_changes_nothing(form, data):
    text = "".join(data.draw(st.lists(st.sampled_from(PARTS), max_size=9)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    whole = read(form, [text])
    assert read(form, pieces) == read(form, text) == whole
    content, calls = whole
    if not calls:
        assert content == text, "text without calls is the answer as it is"


def test_ids_are_of_the_form_that_templates_take():
    [mistral] = ToolCallReader("mistral").read(f"[TOOL_CALLS][{call('f', {})}]", end=True)
    assert len(mistral.id) == 9 and mistral.id.isalnum()
    two = ToolCallReader("llama3_json").read(f"{call('f', {})};{call('f', {})}", end=True)
    assert len({c.id for c in two}) == 2 and all(c.id.startswith("call_") for c in two)


@pytest.mark.parametrize(
    "template, form",
    [
        ("{{ tools }}<tool_call>", "hermes"),
        ("<tool_call><function=f>", None),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("Environment: ipython", "llama3_json"),
        ({"default": "x", "tool_use": "<|python_tag|>"}, "llama3_json"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_template_shows_the_form_of_calls(template, form):
    assert form_of(template) == form


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g"}},
]


def test_an_answer_that_is_held_to_calls_is_read_as_them():
    text = json.dumps([{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}])
    for cut in range(len(text)):
        reader = ForcedReader(None)
        assert reader.read(text[:cut]) == []
        found = reader.read(text[cut:], end=True)
        assert [(c.name, json.loads(c.arguments)) for c in found] == [("f", {"a": 1}), ("g", {})]
    assert len(ForcedReader(None, parallel=False).read(text, end=True)) == 1
    [named] = ForcedReader("f").read('{"a": 2}', end=True)
    assert (named.name, named.arguments) == ("f", '{"a": 2}')
    assert ForcedReader(None).read(text[:9], end=True) == [text[:9]], "cut short"
    assert forced_schema(TOOLS, "f") == {"type": "object"} == forced_schema(TOOLS, "g")
    assert len(forced_schema(TOOLS, None)["items"]["anyOf"]) == 2
