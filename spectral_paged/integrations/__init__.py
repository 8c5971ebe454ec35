"""Other people's libraries over the cache: transformers, Unsloth, Ray.

It knows models and what lies below them; `ray` runs batch files and knows the LLM too. Modules are
imported one by one, for each needs a library of its own.
"""

__all__ = [
    "cached_attention",
    "forward_hooks",
    "padded_rows",
    "patching",
    "ray",
    "row_batch",
    "transformers_cache",
    "unsloth",
]
