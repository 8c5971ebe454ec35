"""Tiny checkpoints for Unsloth, prompts for them, and their tokens and logits.

Functions import transformers, because Unsloth must be imported before it.
"""

from __future__ import annotations

import torch

VOCAB_SIZE = 199
LENGTHS = [40, 1300, 7, 750]
FIELDS = {
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 128, "attn_logit_softcapping": 3.0},
}
RANKS = {"k_rank_keys": 16, "k_rank_values": 16, "prefill_segment": 512}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def checkpoint(folder, family, **changes):
    """Save a tiny random model of `family` in `folder`.

    Weights are scaled up so that continuations vary and depend on far tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from spectral_paged.integrations.unsloth.checkpoints import save_checkpoint

    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    config = AutoConfig.for_model(family, **(fields | FIELDS.get(family, {}) | changes))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    save_checkpoint(model, folder)
    return folder


def batch(lengths=LENGTHS, seed=0):
    """Left-padded random prompts."""
    from spectral_paged.integrations.padded_rows import left_padded

    generator = torch.Generator().manual_seed(seed)
    return left_padded(
        [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    )


def generate(model, inputs, max_new_tokens=6, **options):
    """New tokens `[B, max_new_tokens]`, greedy unless `options` differ."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **(GREEDY | options))
    return out[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def prompt_logits(model, inputs):
    """Logits `[T, vocab]` of all tokens that are no pads, fp32."""
    return model(**inputs, use_cache=True).logits[inputs["attention_mask"].bool()]


def decode_logits(model, inputs, tokens=None):
    """Logits of six decode steps, `[6, B, vocab]`.

    `tokens`, `[B, n]`, are fed to n steps instead, for models whose choice turns on rounding."""
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    count, given = 6, inputs["input_ids"].shape[1]
    if tokens is not None:
        count = tokens.shape[1]

        def forced(ids, scores):
            chosen = tokens[:, ids.shape[1] - given, None].to(ids.device)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

        options |= {"logits_processor": [forced]}
    return torch.stack(model.generate(**inputs, max_new_tokens=count, **options).logits)


def distance(x, y):
    """Relative error of `x` against `y`."""
    return float((x - y).norm() / y.norm())


def adapters(model):
    """`model` with random adapters of rank 4 on every projection."""
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        model,
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=False,
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    )
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model
