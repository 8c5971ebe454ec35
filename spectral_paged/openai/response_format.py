"""OpenAI's `response_format` is read as structured outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectral_paged.errors import refusal, shown
from spectral_paged.sampling import StructuredOutputsParams

_KINDS = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
_SCHEMA_FIELDS = {"name": str, "description": str, "schema": Mapping, "strict": bool}
_NAMED = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "description": {"type": ["string", "null"]},
        "schema": {"type": "object"},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name", "schema"],
    "additionalProperties": False,
}


def _of_kind(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **more},
        "required": ["type", *more],
        "additionalProperties": False,
    }


# what `read_response_format` takes
RESPONSE_FORMAT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "null"},
        _of_kind("text"),
        _of_kind("json_object"),
        _of_kind("json_schema", json_schema=_NAMED),
    ]
}


def read_response_format(value: Any, name: str) -> StructuredOutputsParams | None:
    """Return the structured outputs of a `response_format`, None of text.

    A schema holds whether it is called strict or not.

    Raises:
        InvalidRequestError: it is none; `error.param` is the place.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        kinds = ", ".join(_KINDS)
        raise refusal(f"{name} is {shown(value)}; it must be an object of type {kinds}", name)
    _check_fields(value, _KINDS[kind], name)
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    named, where = value.get("json_schema"), f"{name}.json_schema"
    if not isinstance(named, Mapping):
        raise refusal(f"{where} is {shown(named)}; it must be an object with a schema", where)
    _check_fields(named, _SCHEMA_FIELDS.keys(), where)
    for field, type_ in _SCHEMA_FIELDS.items():
        given = named.get(field)
        missing = given is None and field in ("name", "schema")
        if missing or not (given is None or isinstance(given, type_)):
            wanted = {str: "a string", bool: "true or false"}.get(type_, "a JSON schema")
            place = f"{where}.{field}"
            raise refusal(f"{place} is {shown(given)}; it must be {wanted}", place)
    return StructuredOutputsParams(json=named["schema"])


def _check_fields(value: Mapping[Any, Any], known: Any, where: str) -> None:
    extra = sorted(str(field) for field in value if field not in known)
    if extra:
        place = f"{where}.{extra[0]}"
        raise refusal(f"{where} has {shown(extra)}, which are not supported", place)
