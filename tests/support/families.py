"""Small random models of families with layers that differ, soft caps or other rotations."""

from __future__ import annotations

import torch
import transformers as tf

from spectral_paged import LLM, SamplingParams

VOCAB = 199
LONGEST = 4096
MAX_TOKENS = 8
WINDOW = 96
SLIDES_THEN_ALL = ["sliding_attention", "full_attention"]
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LONGEST,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MIXED = {"sliding_window": WINDOW, "layer_types": SLIDES_THEN_ALL}
FAMILIES = {
    "gemma": (tf.GemmaConfig, {}),
    "gemma2": (
        tf.Gemma2Config,
        MIXED | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (tf.Gemma3TextConfig, MIXED | {"query_pre_attn_scalar": 24}),
    "cohere": (tf.CohereConfig, {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": (tf.Cohere2Config, MIXED | {"logit_scale": 0.5}),
    "phi3": (tf.Phi3Config, {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3, a window": (tf.Phi3Config, {"sliding_window": WINDOW}),
    "olmo2": (tf.Olmo2Config, {}),
    "smollm3": (tf.SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "mistral, a window": (tf.MistralConfig, {"sliding_window": WINDOW}),
    "mistral, a window that is sealed": (tf.MistralConfig, {"sliding_window": 1100}),
    "qwen2, a window in the last layer": (
        tf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3, a window in the first layer": (
        tf.Qwen3Config,
        {"use_sliding_window": True, **MIXED},
    ),
    "olmo3": (
        tf.Olmo3Config,
        MIXED
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                },
            }
        },
    ),
    "exaone4": (tf.Exaone4Config, MIXED),
    "glm4": (tf.Glm4Config, {"partial_rotary_factor": 0.5}),
    "seed_oss": (tf.SeedOssConfig, {"attention_bias": True}),
    "ministral": (tf.MinistralConfig, MIXED),
    "gpt_oss": (
        tf.GptOssConfig,
        MIXED
        | {"sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 1024,
            }
        },
    ),
    "mixtral, a window": (tf.MixtralConfig, {"sliding_window": WINDOW, "num_local_experts": 3}),
    "qwen3_moe, a window": (
        tf.Qwen3MoeConfig,
        {"use_sliding_window": True, "sliding_window": WINDOW, "num_experts": 5}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "gemma2, a window that is sealed": (
        tf.Gemma2Config,
        MIXED | {"query_pre_attn_scalar": 24, "sliding_window": 1100},
    ),
    "cohere2, a window that is sealed": (tf.Cohere2Config, MIXED | {"sliding_window": 1100}),
}


def build(name):
    """A small random model whose weights are drawn wide, so that far tokens and norms count."""
    config_class, changes = FAMILIES[name]
    config = config_class(**(SMALL | changes))
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.16)
            elif "norm" in parameter_name:
                parameter.uniform_(-0.2, 0.4)
                if "gemma" not in name:
                    parameter.add_(1.0)
            elif parameter_name.endswith("sinks"):  # some take most of a softmax, some nothing
                parameter.normal_(std=2.0).add_(5.0)
    return model


def reference(model, prompts, max_tokens=MAX_TOKENS):
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        got = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        found.append(got[0, len(prompt) :].tolist())
    return found


def llm_of(model, **options):
    options = {"kv_cache_bytes": 24 << 20, "max_num_seqs": 16, "debug_poison": True} | options
    return LLM.from_model(model, **options)


def generate(llm, prompts, max_tokens=MAX_TOKENS):
    """Greedy tokens of all prompts in one batch."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    llm.cache.check_integrity()
    return [o.outputs[0].token_ids for o in outputs]
