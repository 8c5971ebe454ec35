"""`/tokenize` and `/detokenize` respond with what a prompt is to the model."""

from __future__ import annotations

from spectral_paged.errors import InvalidRequestError, refusal
from spectral_paged.llm import LLM
from spectral_paged.openai import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    parse_json,
    read_body,
)
from spectral_paged.server.served_names import lora_of
from spectral_paged.server.settings import ServerSettings


def tokenize(llm: LLM, settings: ServerSettings, raw: bytes) -> Tokenized:
    """Return the token ids of a prompt or of a conversation, as completions have them.

    Raises:
        SpectralPagedError: the body is wrong, or the prompt can never be served.
        ApiError: 404, the model is not served.
    """
    asked = read_body(TokenizeRequest, parse_json(raw))
    lora_of(llm, settings, asked.model)
    encoder = llm.engine.prompt_encoder
    if (asked.prompt is None) == (asked.messages is None):
        raise refusal("a body has either a 'prompt' or 'messages'", "prompt")
    if asked.prompt is not None:
        special = asked.add_special_tokens is not False
        ids = encoder.encode(asked.prompt, add_special_tokens=special)
    elif asked.add_special_tokens:
        message = "add_special_tokens is for a prompt: a chat template has its own special tokens"
        raise refusal(message, "add_special_tokens")
    else:
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
        special = llm.allow_special_tokens
        ids = encoder.encode_chat(asked.messages, tools=tools, allow_special_tokens=special)
    names = None
    if asked.return_token_strs:
        names = [str(name) for name in llm.get_tokenizer().convert_ids_to_tokens(ids)]
    return {
        "count": len(ids),
        "max_model_len": llm.cache.max_model_len,
        "tokens": ids,
        "token_strs": names,
    }


def detokenize(llm: LLM, settings: ServerSettings, raw: bytes) -> Detokenized:
    """Return the text of token ids, special tokens spelled out.

    Raises:
        SpectralPagedError: the body is wrong, or an id is none of the vocabulary.
        ApiError: 404, the model is not served.
    """
    asked = read_body(DetokenizeRequest, parse_json(raw))
    lora_of(llm, settings, asked.model)
    if llm.engine.token_bytes is None:
        raise InvalidRequestError("the model has no tokenizer: its tokens have no text")
    try:
        ids = llm.engine.prompt_encoder.encode(asked.tokens)
    except InvalidRequestError as error:
        error.param = "tokens"
        raise
    data = llm.engine.token_bytes.join(ids, skip_special_tokens=False)
    return {"prompt": data.decode("utf-8", "replace")}
