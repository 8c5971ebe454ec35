"""A random llama, small enough for tests, whose output depends on the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 199


def small_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a random llama in fp32 with two layers and four query over two KV heads of width 16.

    Weights are scaled up, so that greedy completions vary and depend on distant tokens.

    Args:
        changes: fields of its `LlamaConfig`.
    """
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def random_prompts(
    lengths: Sequence[int], seed: int = 0, *, vocab_size: int = VOCAB_SIZE
) -> list[list[int]]:
    """Return random token ids of these lengths, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
