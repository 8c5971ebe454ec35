"""Random JSON schemas and regexes whose texts are short, with what checks a text against them."""

from __future__ import annotations

import json
import re

import jsonschema_rs
from hypothesis import strategies as st

NAMES = st.text("abcXYZ_ 09", min_size=1, max_size=5)
BOUNDS = st.tuples(st.integers(-20, 20), st.integers(0, 30))


def _number(kind, bounds):
    low, more = bounds
    return {"type": kind, "minimum": low, "maximum": low + more}


def _string(bounds):
    low, more = bounds
    return {"type": "string", "minLength": low, "maxLength": low + more}


def _object(properties, optional):
    names = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in names if name not in optional],
        "additionalProperties": False,
    }


def _array(items, least, more):
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}


LEAVES = (
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "x y"}, {"const": 3}])
    | st.builds(_number, st.just("integer"), BOUNDS)
    | st.builds(_string, st.tuples(st.integers(0, 3), st.integers(0, 4)))
    | st.lists(NAMES | st.integers(-99, 99), min_size=1, max_size=4).map(lambda x: {"enum": x})
    | st.sampled_from(["^[A-Z]{2}-[0-9]{3}$", "^(a|bc)+d$", "^x?y{1,3}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 9}
    )
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.sets(NAMES, max_size=2))
        | st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2))
        | st.lists(inner, min_size=1, max_size=3).map(lambda kinds: {"anyOf": kinds})
    ),
    max_leaves=6,
)
_PIECES = st.sampled_from(["[a-c]", "\\d", "x", "(ab|c)", "[^x]", "\\.", "é", "(foo|bar|baz)"])
_COUNTS = st.sampled_from(["", "", "?", "{2}", "{0,3}", "{1,4}"])
REGEXES = st.lists(st.tuples(_PIECES, _COUNTS).map("".join), min_size=1, max_size=5).map("".join)
FORMS = SCHEMAS.map(lambda schema: {"json": schema}) | REGEXES.map(lambda regex: {"regex": regex})


def matches(form, text):
    """True if a text is what the form asks for."""
    if "regex" in form:
        return re.fullmatch(form["regex"], text, re.ASCII) is not None
    return jsonschema_rs.is_valid(form["json"], json.loads(text))
