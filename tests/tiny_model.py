"""A small random llama that says different things to different prompts, for engine tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_paged import LLM, PageFormat

VOCAB = 199


def tiny_model(**changes):
    """fp32, two layers, four query heads over two KV heads; weights scaled up so that greedy
    continuations vary and depend on far tokens."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | changes
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def tiny_format(name="spectral-int8", **changes):
    return PageFormat.preset(
        name, num_kv_heads=2, head_dim=16, **({"prefill_segment": 512} | changes)
    )


def tiny_llm(format=None, **options):
    """An LLM over the tiny model: 16 MiB of cache, poisoned on free, token ids only."""
    defaults = {"kv_cache_bytes": 16 << 20, "max_num_seqs": 32, "poison": True}
    return LLM.from_model(tiny_model(), kv_format=format or tiny_format(), **(defaults | options))


def random_prompts(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths]


def raise_once(monkeypatch, owner, name, error, call):
    """Let the `call`-th call of `owner.name` raise `error`, and no other."""
    before, calls = getattr(owner, name), []

    def flaky(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, flaky)
