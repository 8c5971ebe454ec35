"""Small random models of families whose layers are all alike, by variant."""

from __future__ import annotations

import torch
import transformers as tf

VOCAB = 199
LONGEST = 2048


def yarn(factor=4.0):
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": 512,
    }


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
VARIANTS = {
    "llama": (tf.LlamaConfig, {}),
    "llama, llama3 rope, untied": (
        tf.LlamaConfig,
        {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
    ),
    "llama, yarn, attention and mlp bias": (
        tf.LlamaConfig,
        {"rope_parameters": yarn(), "attention_bias": True, "mlp_bias": True},
    ),
    "llama, linear rope, one head per kv head": (
        tf.LlamaConfig,
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            "num_key_value_heads": 6,
        },
    ),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "mistral, wide heads, a window that never slides": (
        tf.MistralConfig,
        {"sliding_window": LONGEST, "head_dim": 32},
    ),
    "qwen2": (tf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, yarn, one kv head, window in no layer": (
        tf.Qwen2Config,
        {
            "rope_parameters": yarn(2.0),
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 2,
        },
    ),
    "qwen3": (tf.Qwen3Config, {"head_dim": 32}),
    "granite": (
        tf.GraniteConfig,
        {
            "attention_multiplier": 0.09,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 4.0,
        },
    ),
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe, a shared expert": (
        tf.Qwen2MoeConfig,
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen2_moe, a window in the first layer": (
        tf.Qwen2MoeConfig,
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 64,
            "use_sliding_window": True,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3_moe, a dense layer": (
        tf.Qwen3MoeConfig,
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "head_dim": 32,
            "mlp_only_layers": [0],
        },
    ),
    "olmoe, clipped": (
        tf.OlmoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 1.5},
    ),
    "granitemoe": (
        tf.GraniteMoeConfig,
        {
            "num_local_experts": 4,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 3.0,
        },
    ),
    "granite, tied, attention bias": (
        tf.GraniteConfig,
        {"attention_multiplier": 0.5, "tie_word_embeddings": True, "attention_bias": True},
    ),
}


def build(variant):
    """A small random model; weights, biases and norms drawn wide enough that all of them count."""
    config_class, changes = VARIANTS[variant]
    config = config_class(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": LONGEST,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | changes
    )
    torch.manual_seed(5)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.13)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.6, 1.4)
    return model
