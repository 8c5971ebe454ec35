"""Clients and agent frameworks get what they ask for: texts, streams, objects, tools, errors."""

from __future__ import annotations

import json
from typing import Literal

import instructor
import litellm
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

MODEL = "smollm2"
ASK = "Name a fruit and a colour."


class Fruit(BaseModel):
    name: Literal["apple", "pear", "plum"]
    ripe: bool


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"{city}: sunny"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


# ---- openai ------------------------------------------------------------------------------


def test_openai_parses_objects_whole_and_streamed(client):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": ASK}], "max_tokens": 60}
    whole = client.chat.completions.parse(response_format=Fruit, **asked)
    assert isinstance(whole.choices[0].message.parsed, Fruit)
    with client.chat.completions.stream(response_format=Fruit, **asked) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Fruit)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_openai_calls_tools_and_takes_their_answers(client):
    talk = [{"role": "user", "content": "How is the weather in Rome?"}]
    asked = {"model": MODEL, "tools": [TOOL], "max_tokens": 120, "parallel_tool_calls": False}
    asked["temperature"] = 0
    made = client.chat.completions.create(messages=talk, tool_choice="required", **asked)
    (call,) = made.choices[0].message.tool_calls
    assert weather(**json.loads(call.function.arguments))
    talk += [
        made.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    made = client.chat.completions.create(messages=talk, tool_choice="none", **asked)
    assert made.choices[0].message.content


def test_openai_responses_are_parsed_and_streamed(client):
    asked = {"model": MODEL, "input": ASK, "max_output_tokens": 60}
    assert client.responses.create(**asked).output_text
    assert isinstance(client.responses.parse(text_format=Fruit, **asked).output_parsed, Fruit)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in (
        "response.completed",
        "response.incomplete",
    )


# ---- langchain ---------------------------------------------------------------------------


@pytest.fixture
def chat(url):
    return ChatOpenAI(
        model=MODEL, base_url=url, api_key="none", max_tokens=60, temperature=0, max_retries=0
    )


def test_langchain_invokes_and_streams(chat):
    assert chat.invoke(ASK).content
    assert "".join(piece.content for piece in chat.stream(ASK)) == chat.invoke(ASK).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_has_structured_output(chat, method):
    found = chat.with_structured_output(Fruit, method=method).invoke(ASK)
    assert isinstance(found, Fruit)


def test_langchain_binds_tools(chat):
    bound = chat.bind_tools([tool(weather)], tool_choice="weather")
    answer = bound.invoke([HumanMessage("How is the weather in Rome?")])
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    said = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    assert chat.invoke([HumanMessage("How is it in Rome?"), answer, said]).content


# ---- llama-index -------------------------------------------------------------------------


@pytest.fixture
def like(url):
    return OpenAILike(
        model=MODEL,
        api_base=url,
        api_key="none",
        context_window=2048,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=60,
        temperature=0,
        max_retries=0,
        should_use_structured_outputs=True,
    )


def test_llama_index_chats_completes_and_streams(like):
    talk = [ChatMessage(role="user", content=ASK)]
    whole = like.chat(talk).message.content
    assert whole
    assert [*like.stream_chat(talk)][-1].message.content == whole
    plain = OpenAILike(
        model=MODEL,
        api_base=like.api_base,
        api_key="none",
        is_chat_model=False,
        max_tokens=9,
        temperature=0,
    )
    assert plain.complete("The sea is").text == [*plain.stream_complete("The sea is")][-1].text


def test_llama_index_has_structured_output(like):
    found = like.as_structured_llm(Fruit).complete(ASK)
    assert isinstance(found.raw, Fruit)


# ---- litellm -----------------------------------------------------------------------------


def test_litellm_completes_streams_and_knows_a_context_that_is_too_long(url):
    asked = {
        "model": f"openai/{MODEL}",
        "api_base": url,
        "api_key": "none",
        "max_tokens": 9,
        "num_retries": 0,
    }
    talk = [{"role": "user", "content": ASK}]
    assert litellm.completion(messages=talk, **asked).choices[0].message.content
    stream = litellm.completion(messages=talk, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    long = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=long, **asked)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=talk, **asked | {"model": "openai/another"})


# ---- instructor --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "JSON_SCHEMA"])
def test_instructor_has_objects_in_three_modes(client, mode):
    made = instructor.from_openai(client, mode=instructor.Mode[mode])
    found = made.create(
        model=MODEL,
        response_model=Fruit,
        messages=[{"role": "user", "content": f"{ASK} Write name (apple, pear or plum) and ripe."}],
        max_tokens=120,
        max_retries=1,
        temperature=0,
        **({"extra_body": _held(mode)} if mode == "JSON" else {}),
    )
    assert isinstance(found, Fruit)


def _held(mode):
    """The schema for a small model, of which JSON mode asks for any object."""
    return {"response_format": None, "structured_outputs": {"json": Fruit.model_json_schema()}}


# ---- pydantic-ai -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
@pytest.mark.parametrize("output", [ToolOutput, NativeOutput])
def test_pydantic_ai_has_objects(url, kind, output):
    model = kind(MODEL, provider=OpenAIProvider(base_url=url, api_key="none"))
    settings = {"max_tokens": 90, "temperature": 0}
    agent = Agent(model, output_type=output(Fruit), model_settings=settings)
    assert isinstance(agent.run_sync(ASK).output, Fruit)


def test_pydantic_ai_streams_text(url):
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = Agent(model, model_settings={"max_tokens": 20, "temperature": 0})
    stream = agent.run_stream_sync(ASK)
    assert [*stream.stream_text()][-1]
