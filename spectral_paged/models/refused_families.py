"""Families of causal language models in transformers that are refused, each with its limit.

Those of the pinned release are all here or in `geometry.FAMILIES`, as a test holds.
"""

from __future__ import annotations

IMAGES = "it reads or makes images or sound, and the engine has text alone"
GEMMA3 = "it is the model with images; its text model, of type gemma3_text, is served"
ENCODER = "it is an encoder, or a decoder that attends to an encoder"
POSITIONS = "its positions are learned or biases of scores, and pages need RoPE or none"
NAMES = (
    "its attention is not called through transformers' interface with options, or its layers have "
    "other names than the engine reads"
)
LATENT = "its heads share a latent vector a token (MLA), and pages hold K and V of heads"
RECURRENT = "layers of it have a recurrent or convolution state, which the cache has no slots for"
SHAPES = "its layers differ in heads or widths, or share K and V, and a cache has one shape of each"
OTHER_SCORES = "its attention is no softmax over all tokens before a query or over a window of them"
LAYERS_RETURN = "its layers run several times a token, or over patches of bytes"
DRAFTS = "it drafts tokens for another model, whose K and V it reads"
UNCOMPARED = "no test compares its tokens with those of transformers yet"

LIMITS: dict[str, tuple[str, ...]] = {
    GEMMA3: ("gemma3",),
    IMAGES: (
        *("emu3", "fuyu", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4"),
        *("mllama", "moshi", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5"),
        *("qwen3_5_moe", "qwen4_exp", "trocr", "whisper"),
    ),
    ENCODER: (
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot"),
        *("blenderbot-small", "camembert", "data2vec-text", "electra", "ernie", "marian", "mbart"),
        *("megatron-bert", "mvp", "pegasus", "plbart", "prophetnet", "rembert", "roberta"),
        *("roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl"),
        *("xlnet", "xmod"),
    ),
    POSITIONS: (
        *("biogpt", "bloom", "cpmant", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "mpt"),
        *("openai-gpt", "opt", "reformer", "xglm"),
    ),
    NAMES: (
        *("codegen", "dbrx", "falcon", "gpt_neox", "gpt_neox_japanese", "gptj"),
        *("modernbert-decoder", "nemotron", "persimmon", "phi", "stablelm"),
    ),
    LATENT: (
        *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"),
        *("glm4_moe_lite", "glm_moe_dsa", "hy_v4", "longcat_flash", "minicpm3", "youtu"),
    ),
    RECURRENT: (
        *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling_text", "jamba"),
        *("kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h"),
        *("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text"),
        *("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
    ),
    SHAPES: (*("gemma3n_text", "gemma4_text", "gemma4_unified_text", "laguna", "mimo_v2_flash"),),
    OTHER_SCORES: ("diffllama", "doge", "jetmoe", "llama4_text", "minimax_m3_vl_text"),
    LAYERS_RETURN: ("blt", "hrm_text"),
    DRAFTS: ("gemma4_assistant", "gemma4_unified_assistant"),
    UNCOMPARED: (
        *("afmoe", "apertus", "arcee", "aria_text", "bitnet", "cohere2_moe", "cohere_compass_text"),
        *("cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm"),
        *("glm4_moe", "granite_swa", "granitemoe_swa", "granitemoeshared", "helium", "hy_v3"),
        *("hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "jais2", "mellum", "minimax_m2"),
        *("ministral3", "nanochat", "olmo", "phimoe", "solar_open", "starcoder2", "vaultgemma"),
    ),
}


def limit_of(family: str) -> str | None:
    """Return why a family is refused; None if it is not in the list."""
    return next((limit for limit, families in LIMITS.items() if family in families), None)
