"""OpenAI's API formats: bodies are read into requests, and outputs are written as choices.

The package imports sampling parameters, prompts and outputs. It serves nothing.
"""

from __future__ import annotations

from spectral_paged.openai.adapters import (
    LOAD_ADAPTER_URL,
    UNLOAD_ADAPTER_URL,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
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
    ToolCallObject,
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
    call_object,
    chat_choice,
    chat_logprobs,
    counts,
    prompt_tables,
    text_choice,
    text_logprobs,
    token_counts,
    usage,
)
from spectral_paged.openai.responses import (
    RESPONSES_URL,
    ResponseObject,
    ResponsesRequest,
)
from spectral_paged.openai.tokenization import (
    DETOKENIZE_URL,
    TOKENIZE_URL,
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)
from spectral_paged.openai.tool_calls import (
    FORMS,
    ForcedReader,
    ToolCall,
    ToolCallReader,
)
from spectral_paged.openai.tools import (
    ToolUse,
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
    "FORMS",
    "ForcedReader",
    "LOAD_ADAPTER_URL",
    "LoadAdapterRequest",
    "ModelCard",
    "ModelList",
    "OpenAIRequest",
    "RESPONSES_URL",
    "ResponseObject",
    "ResponsesRequest",
    "SAMPLING_FIELDS",
    "TOKENIZE_URL",
    "TextChoice",
    "TokenizeRequest",
    "Tokenized",
    "ToolCall",
    "ToolCallObject",
    "ToolCallReader",
    "ToolUse",
    "UNLOAD_ADAPTER_URL",
    "UnloadAdapterRequest",
    "Usage",
    "call_object",
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
