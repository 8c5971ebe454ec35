"""An LLM over the package's small random llama, for engine tests."""

from __future__ import annotations

from spectral_paged import LLM, PageFormat
from spectral_paged.conformance.small_llama import (
    VOCAB_SIZE as VOCAB,  # noqa: F401
    random_prompts,  # noqa: F401
    small_llama as tiny_model,
)


def tiny_format(name="spectral-int8", **changes):
    return PageFormat.preset(
        name, num_kv_heads=2, head_dim=16, **({"prefill_segment": 512} | changes)
    )


def tiny_llm(format=None, **options):
    """An LLM over the tiny model: 16 MiB of cache, poisoned on free, token ids only."""
    defaults = {"kv_cache_bytes": 16 << 20, "max_num_seqs": 32, "debug_poison": True}
    return LLM.from_model(tiny_model(), kv_format=format or tiny_format(), **(defaults | options))


def raise_once(monkeypatch, owner, name, error, call):
    """Make the `call`-th call of `owner.name` raise `error`; all others pass."""
    before, calls = getattr(owner, name), []

    def flaky(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, flaky)
