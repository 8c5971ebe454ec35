"""The bodies and answers of `/tokenize` and `/detokenize`, whose names are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from spectral_paged.engine import MESSAGES_SCHEMA, check_messages
from spectral_paged.openai.bodies import Checked, unserved
from spectral_paged.openai.objects import closed
from spectral_paged.openai.strict import Strict
from spectral_paged.openai.tools import Tools

TOKENIZE_URL, DETOKENIZE_URL = "/tokenize", "/detokenize"


def _messages(messages: object, name: str) -> list[dict[str, Any]] | None:
    return None if messages is None else check_messages(messages)


_MESSAGES = {"anyOf": [MESSAGES_SCHEMA, {"type": "null"}]}


class TokenizeRequest(Strict):
    """The body of `/tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, Checked(_messages, _MESSAGES)] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools | None = None
    # not served
    add_generation_prompt: Annotated[None, unserved(True)] = None
    chat_template: Annotated[None, unserved()] = None
    chat_template_kwargs: Annotated[None, unserved({})] = None
    continue_final_message: Annotated[None, unserved(False)] = None
    media_io_kwargs: Annotated[None, unserved({})] = None
    mm_processor_kwargs: Annotated[None, unserved({})] = None


class DetokenizeRequest(Strict):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


@closed
class Tokenized(TypedDict):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@closed
class Detokenized(TypedDict):
    """The answer of `/detokenize`."""

    prompt: str
