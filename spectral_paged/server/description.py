"""The server's OpenAPI description, made from the models of request bodies and of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from spectral_paged.openai import (
    LOAD_ADAPTER_URL,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionChunk,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    ErrorResponse,
    LoadAdapterRequest,
    ModelCard,
    ModelList,
    ResponseObject,
    ResponsesRequest,
    Tokenized,
    TokenizeRequest,
    UnloadAdapterRequest,
    closed,
)

_COMPONENT = "#/components/schemas/{model}"
_WHEN = {
    400: "a field is wrong or not supported, or the prompt is too long",
    401: "the key is missing or wrong",
    404: "the model is not served here",
    408: "the body did not arrive in time",
    413: "the body is too long",
    415: "the body is not of the type application/json",
    429: "there is no room now: try again after Retry-After seconds",
    500: "the request failed in the server",
    503: "the server is stopping",
}


@closed
class Health(TypedDict):
    """The state of the server; `problem` says what is wrong with it."""

    status: str
    problem: NotRequired[str]


@closed
class Version(TypedDict):
    version: str


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse, "description": _WHEN[status]} for status in statuses}


def _named(component: str) -> dict[str, str]:
    return {"$ref": _COMPONENT.format(model=component)}


def _events(chunk: Any) -> dict[str, Any]:
    """Return the schema of an event: a chunk, an error that ends the stream, or its end."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_named(chunk.__name__), _named(ErrorResponse.__name__)]},
    }
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [data, {"const": "[DONE]"}]}},
        "required": ["data"],
    }


def _call(name: str, summary: str, body: type[BaseModel], answer: Any) -> dict[str, Any]:
    """Describe a route that takes a body."""
    return {
        "operation_id": name,
        "summary": summary,
        "responses": {200: {"model": answer}, **_errors(*_WHEN)},
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _named(body.__name__)}},
            }
        },
    }


def _completion(
    name: str, summary: str, body: type[BaseModel], answer: Any, chunk: Any
) -> dict[str, Any]:
    """Describe a route that answers as a whole or with a stream."""
    found = _call(name, summary, body, answer)
    found["responses"][200] |= {
        "description": "The completions, at once or as a stream of chunks.",
        "content": {"text/event-stream": {"schema": _events(chunk)}},
    }
    return found


# keyword arguments of routes
CHAT = _completion(
    "createChatCompletion",
    "Complete a conversation",
    ChatCompletionRequest,
    ChatCompletion,
    ChatCompletionChunk,
)
COMPLETIONS = _completion(
    "createCompletion", "Complete prompts", CompletionRequest, Completion, CompletionChunk
)
RESPONSES = _call("createResponse", "Answer a conversation", ResponsesRequest, ResponseObject)
RESPONSES["responses"][200]["content"] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
            "required": ["data"],
        }
    }
}
TOKENIZE = _call("tokenize", "Turn a prompt into token ids", TokenizeRequest, Tokenized)
DETOKENIZE = _call("detokenize", "Turn token ids into text", DetokenizeRequest, Detokenized)


def _change(name: str, summary: str, body: type[BaseModel]) -> dict[str, Any]:
    """Describe a route that says in a text what it has done."""
    found = _call(name, summary, body, None)
    found["responses"][200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    return found


LOAD_ADAPTER = _change("loadAdapter", "Load a LoRA adapter", LoadAdapterRequest)
UNLOAD_ADAPTER = _change("unloadAdapter", "Unload a LoRA adapter", UnloadAdapterRequest)
VERSION: dict[str, Any] = {
    "operation_id": "version",
    "summary": "Name the version of the server",
    "responses": {200: {"model": Version}},
}
MODELS: dict[str, Any] = {
    "operation_id": "listModels",
    "summary": "List the names of the model",
    "responses": {200: {"model": ModelList}, **_errors(401)},
}
MODEL: dict[str, Any] = {
    "operation_id": "retrieveModel",
    "summary": "Describe the model",
    "responses": {200: {"model": ModelCard}, **_errors(401, 404)},
    "openapi_extra": {
        "parameters": [
            {
                "name": "name",
                "in": "path",
                "required": True,
                "schema": _named("ModelName"),
            }
        ]
    },
}
HEALTH: dict[str, Any] = {
    "operation_id": "health",
    "summary": "Say whether requests can be served",
    "responses": {200: {"model": Health}, 503: {"model": Health}},
}
METRICS: dict[str, Any] = {
    "operation_id": "metrics",
    "summary": "Metrics in Prometheus' text format",
    "responses": {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors(401)},
}


BODIES: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    ResponsesRequest,
)
ADAPTER_BODIES = (LoadAdapterRequest, UnloadAdapterRequest)


class DescribedApp(FastAPI):
    """An application whose description has the bodies that its routes read themselves, too.

    Args:
        model_names: the names that requests may give; none: they are not described.
    """

    def __init__(self, *, model_names: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self._name: dict[str, Any] = {"type": "string"}
        if model_names:
            self._name["enum"] = list(model_names)

    def openapi(self) -> dict[str, Any]:
        """Return the description, which the first call makes."""
        if self.openapi_schema is None:
            found = super().openapi()
            bodies = [*BODIES, *(ADAPTER_BODIES if LOAD_ADAPTER_URL in found["paths"] else ())]
            _, models = TypeAdapter.json_schemas(
                [
                    *((body, "validation", TypeAdapter(body)) for body in bodies),
                    (CompletionChunk, "serialization", TypeAdapter(CompletionChunk)),
                    (ChatCompletionChunk, "serialization", TypeAdapter(ChatCompletionChunk)),
                ],
                ref_template=_COMPONENT,
            )
            for body in bodies:
                name = {"anyOf": [_named("ModelName"), {"type": "null"}]}
                if "model" in body.model_fields:
                    models["$defs"][body.__name__]["properties"]["model"] = name
            found["components"]["schemas"] |= models["$defs"] | {"ModelName": self._name}
        return super().openapi()
