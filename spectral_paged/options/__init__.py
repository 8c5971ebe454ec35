"""Options are declared once, by the fields of dataclasses, for callables and the command line.

The package may name types of pages, and imports neither them nor torch.
"""

from __future__ import annotations

from spectral_paged.options.command_line import (
    CommandParser,
    add_options,
    given_options,
    option,
    option_fields,
    with_dashes,
)
from spectral_paged.options.declared import (
    DEFAULT_MODEL,
    CacheOptions,
    CacheOptionsDict,
    LLMOptions,
    LLMOptionsDict,
)
from spectral_paged.options.engine_args import (
    AsyncEngineArgs,
    EngineArgs,
)
from spectral_paged.options.lora_request import (
    LoRARequest,
    LoRARequests,
    lora_list,
    lora_modules,
)
from spectral_paged.options.readers import (
    num_tokens,
    parse_bytes,
    port_number,
    positive,
)
from spectral_paged.options.speculative_config import (
    MAX_SPECULATIVE_TOKENS,
    SpeculativeConfig,
)
from spectral_paged.options.vllm_names import (
    METHODS_NOT_SERVED,
    NOT_SERVED,
    PAGE,
    TAKEN,
    instead_of_method,
)

__all__ = [
    "AsyncEngineArgs",
    "CacheOptions",
    "CacheOptionsDict",
    "CommandParser",
    "DEFAULT_MODEL",
    "EngineArgs",
    "LLMOptions",
    "LLMOptionsDict",
    "LoRARequest",
    "LoRARequests",
    "MAX_SPECULATIVE_TOKENS",
    "METHODS_NOT_SERVED",
    "NOT_SERVED",
    "PAGE",
    "SpeculativeConfig",
    "TAKEN",
    "add_options",
    "given_options",
    "instead_of_method",
    "lora_list",
    "lora_modules",
    "num_tokens",
    "option",
    "option_fields",
    "parse_bytes",
    "port_number",
    "positive",
    "with_dashes",
]
