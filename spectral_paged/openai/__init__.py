"""OpenAI's API formats: bodies are read into requests, and outputs are written as choices.

The package imports sampling parameters, prompts and outputs. It serves nothing.
"""

from __future__ import annotations

from spectral_paged.openai.bodies import (
    ChatCompletionRequest,
    CompletionRequest,
)
from spectral_paged.openai.objects import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ErrorResponse,
    ModelCard,
    ModelList,
    TextChoice,
    Usage,
    closed,
)
from spectral_paged.openai.request import (
    CHAT_URL,
    COMPLETIONS_URL,
    SAMPLING_FIELDS,
    OpenAIRequest,
    parse_body,
    parse_json,
    read_body,
)
from spectral_paged.openai.response import (
    chat_choice,
    chat_logprobs,
    counts,
    prompt_tables,
    text_choice,
    text_logprobs,
    token_counts,
    usage,
)
from spectral_paged.openai.tokenization import (
    DETOKENIZE_URL,
    TOKENIZE_URL,
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)

__all__ = [
    "CHAT_URL",
    "COMPLETIONS_URL",
    "ChatChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "Completion",
    "CompletionChunk",
    "CompletionRequest",
    "DETOKENIZE_URL",
    "DetokenizeRequest",
    "Detokenized",
    "ErrorResponse",
    "ModelCard",
    "ModelList",
    "OpenAIRequest",
    "SAMPLING_FIELDS",
    "TOKENIZE_URL",
    "TextChoice",
    "TokenizeRequest",
    "Tokenized",
    "Usage",
    "chat_choice",
    "chat_logprobs",
    "closed",
    "counts",
    "parse_body",
    "parse_json",
    "prompt_tables",
    "read_body",
    "text_choice",
    "text_logprobs",
    "token_counts",
    "usage",
]
