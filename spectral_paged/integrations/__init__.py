"""Integrations of transformers, Unsloth, Ray, vLLM and lm-eval with the cache.

Modules are imported one by one, because each needs a library of its own. They import `models` and
the packages below it; `ray` runs batch files and also imports the LLM, as
`lm_eval` does.
"""

__all__ = [
    "cached_attention",
    "forward_hooks",
    "lm_eval",
    "padded_rows",
    "patching",
    "ray",
    "row_batch",
    "transformers_cache",
    "unsloth",
    "vllm",
]
