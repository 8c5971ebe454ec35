"""Left-padded batches for transformers' generate, and caches over spectral pages for them."""

from __future__ import annotations

from spectral_paged.integrations.cached_attention import ATTENTION_NAME
from spectral_paged.integrations.padded_rows import left_padded
from spectral_paged.integrations.transformers_cache import SpectralPagedCache
from support import families, model_variants
from support.tiny_model import random_prompts, tiny_model

LENGTHS = (5, 700, 64, 1300)  # landmarks only, one page, one exact page, two pages
BUILDERS = {
    **dict.fromkeys(model_variants.VARIANTS, model_variants.build),
    **dict.fromkeys(families.FAMILIES, families.build),
}  # a small random model of every family and kind of layer that is served


def build(name):
    """The model `name` of `BUILDERS`, with one of transformers' attentions."""
    return BUILDERS[name](name)


def batch(lengths=LENGTHS, seed=0):
    return left_padded(random_prompts(lengths, seed))


def attending_model(**changes):
    """The tiny llama with the attention that a `SpectralPagedCache` needs."""
    model = tiny_model(**changes)
    model.set_attn_implementation(ATTENTION_NAME)
    return model


def paged_cache(model, kv_format="exact", **options):
    """A `SpectralPagedCache` of 16 MiB, poisoned on free."""
    defaults = {"kv_cache_bytes": 16 << 20, "max_num_seqs": 16, "debug_poison": True}
    return SpectralPagedCache(model, kv_format, **(defaults | options))


def generated(model, inputs, cache=None, **options):
    """Token ids that greedy (by default) `generate` adds, `[rows, new]`."""
    defaults = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**inputs, past_key_values=cache, **(defaults | options))
    return out[:, inputs["input_ids"].shape[1] :]
