"""Architectures of GGUF files: the transformers config of each, and the names of its tensors.

An architecture is listed only if all its keys and tensors are known. Each takes its keys from
`Keys`, so that a key that is not taken is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spectral_paged.errors import CorruptFileError, UnsupportedModelError
from spectral_paged.models.gguf.file import GGUFFile
from spectral_paged.models.gguf.keys import REMEDY, Keys
from spectral_paged.models.gguf.rope import rope_parameters

Array = np.ndarray[Any, Any]

OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS_OF_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Keys, the values with which they change nothing, and the effect of any other value.
UNSERVED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("attention.causal", (True,), "tokens see later ones"),
    ("attention.clamp_kqv", (0.0,), "queries, keys and values are clamped"),
    ("attention.max_alibi_bias", (0.0,), "attention has ALiBi"),
    ("attention.layer_norm_epsilon", (0.0,), "its norms take the mean away"),
    ("use_parallel_residual", (False,), "attention and MLP run side by side"),
    ("pooling_type", (0,), "it makes embeddings of texts"),
    ("expert_count", (0,), "its MLPs are experts"),
    ("expert_used_count", (0,), "its MLPs are experts"),
    ("nextn_predict_layers", (0,), "its last layers predict later tokens"),
    ("embedding_scale", (1.0, 0.0), "embeddings are scaled"),
    ("residual_scale", (1.0, 0.0), "residuals are scaled"),
    ("logit_scale", (1.0, 0.0), "logits are scaled"),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The conversion of one architecture's files to a model of transformers.

    Attributes:
        config: computes config keywords from the keys that not all architectures have.
        layer: tensor names of a layer that differ from llama's; None removes one.
        pairs_interleaved: the file's queries and keys pair dimensions 2i and 2i + 1.
        norms_plus_one: the file's norm weights are one more than transformers'.
    """

    config: Callable[[GGUFFile, Keys, dict[str, Any]], dict[str, Any]]
    layer: dict[str, str | None] = field(default_factory=dict)
    pairs_interleaved: bool = False
    norms_plus_one: bool = False

    def gguf_name(self, name: str) -> str:
        """The name in the file of a tensor of transformers' model."""
        stem, _, kind = name.rpartition(".")
        head, _, inner = stem.partition("model.layers.")
        if not inner:
            return f"{_key(OUTSIDE, head)}.{kind}"
        layer, _, inner = inner.partition(".")
        return f"blk.{layer}.{_key(IN_A_LAYER | self.layer, inner)}.{kind}"

    def converted(self, name: str, values: Array, config: Any) -> Array:
        """The values in transformers' model of the tensor that the file calls `name`."""
        if self.norms_plus_one and name.endswith("norm.weight"):
            return values - 1.0
        if self.pairs_interleaved and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads
            if ".attn_k." in name:
                heads = config.num_key_value_heads
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])
            return pairs.swapaxes(1, 2).reshape(values.shape)
        return values


def _key(names: Mapping[str, str | None], value: str) -> str:
    return next(key for key, found in names.items() if found == value)


def common_config(file: GGUFFile, keys: Keys, num_tokens: int) -> dict[str, Any]:
    """Config keywords that all architectures have, after checks of sizes and vocabulary.

    Raises:
        UnsupportedModelError: a key asks for a computation that no architecture here has.
        CorruptFileError: a key is missing or has a value that no model has.
    """
    for key, allowed, why in UNSERVED:
        keys.expect(key, *allowed, why=why)
    keys.skip("tensor_data_layout")  # of the weights before conversion
    hidden = keys.integer("embedding_length", least=1)
    heads = keys.integer("attention.head_count", least=1)
    head_dim = keys.integer("attention.key_length", max(1, hidden // heads), least=1)
    layers = keys.integer("block_count", least=1)
    if layers > len(file.tensors):  # checked before transformers makes a model of so many layers
        raise CorruptFileError(
            f"{file.path}: {keys.prefix}block_count is {layers}, and there are "
            f"{len(file.tensors)} tensors: fetch it again"
        )
    keys.expect("attention.value_length", head_dim, why="keys and values differ in width")
    keys.expect("vocab_size", num_tokens, why="its vocabulary is not the tokenizer's")
    return {
        "vocab_size": num_tokens,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length", least=1),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads, least=1),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length", least=1),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _plain_attention(keys: Keys, known: dict[str, Any]) -> None:
    """Refuse soft-caps and another scale of scores, which only Gemma has."""
    scale = known["head_dim"] ** -0.5
    keys.expect("attention.scale", scale, 0.0, why="attention scores have another scale")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.expect(name, 0.0, why="scores are capped")


def _whole_heads(keys: Keys, known: dict[str, Any]) -> None:
    keys.expect("rope.dimension_count", known["head_dim"], why="only a part of each head turns")


def _plain_rope(file: GGUFFile, keys: Keys, known: dict[str, Any]) -> dict[str, Any]:
    context = known["max_position_embeddings"]
    return rope_parameters(file, keys, head_dim=known["head_dim"], context=context)


def _no_window(keys: Keys, known: dict[str, Any]) -> None:
    """Refuse a sliding window that is shorter than the context."""
    window = keys.integer("attention.sliding_window", 0)
    if window and window < known["max_position_embeddings"]:
        keys.expect("attention.sliding_window", 0, why="attention slides in some of its layers")
    keys.expect("attention.sliding_window_pattern", 0, 1, False, why="some of its layers slide")


def _llama(file: GGUFFile, keys: Keys, known: dict[str, Any]) -> dict[str, Any]:
    _plain_attention(keys, known)
    _whole_heads(keys, known)
    found = {"model_type": "llama", "rope_parameters": _plain_rope(file, keys, known)}
    keys.expect("attention.sliding_window_pattern", 0, 1, False, why="some of its layers slide")
    if window := keys.integer("attention.sliding_window", 0):
        return found | {"model_type": "mistral", "sliding_window": window}
    return found | {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


def _qwen(model_type: str) -> Callable[[GGUFFile, Keys, dict[str, Any]], dict[str, Any]]:
    def config(file: GGUFFile, keys: Keys, known: dict[str, Any]) -> dict[str, Any]:
        _plain_attention(keys, known)
        _whole_heads(keys, known)
        _no_window(keys, known)
        return {"model_type": model_type, "rope_parameters": _plain_rope(file, keys, known)}

    return config


def _phi3(file: GGUFFile, keys: Keys, known: dict[str, Any]) -> dict[str, Any]:
    _plain_attention(keys, known)
    turned = keys.integer("rope.dimension_count", known["head_dim"], least=2)
    context = known["max_position_embeddings"]
    rope = rope_parameters(file, keys, head_dim=turned, context=context)
    keys.expect("attention.sliding_window_pattern", 0, 1, False, why="some of its layers slide")
    return {
        "model_type": "phi3",
        "rope_parameters": rope | {"partial_rotary_factor": turned / known["head_dim"]},
        "original_max_position_embeddings": context,
        "sliding_window": keys.integer("attention.sliding_window", 0) or None,
    }


def _gemma(file: GGUFFile, keys: Keys, known: dict[str, Any], largest: int) -> dict[str, Any]:
    """Config keywords that Gemma 2 and 3 share.

    The model with `largest` layers scales scores by the model's width over its number of heads, the
    others by the head's width.
    """
    _whole_heads(keys, known)
    scalar: float = known["head_dim"]
    if known["num_hidden_layers"] == largest:
        scalar = known["hidden_size"] / known["num_attention_heads"]
    if scale := keys.number("attention.scale", 0.0):
        scalar = scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-3 else scalar
    }


def _gemma2(file: GGUFFile, keys: Keys, known: dict[str, Any]) -> dict[str, Any]:
    keys.expect("attention.sliding_window_pattern", 2, why="other layers slide than in Gemma 2")
    return _gemma(file, keys, known, 46) | {
        "model_type": "gemma2",
        "rope_parameters": _plain_rope(file, keys, known),
        "sliding_window": keys.integer("attention.sliding_window", 4096, least=1),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0) or None,
    }


def _gemma3(file: GGUFFile, keys: Keys, known: dict[str, Any]) -> dict[str, Any]:
    layers, context = known["num_hidden_layers"], known["max_position_embeddings"]
    slides = _sliding_layers(keys, layers)
    whole = rope_parameters(file, keys, head_dim=known["head_dim"], context=context, theta=1e6)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return _gemma(file, keys, known, 62) | {
        "model_type": "gemma3_text",
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
        "sliding_window": keys.integer("attention.sliding_window", least=1),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 0.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
    }


def _sliding_layers(keys: Keys, num_layers: int) -> list[bool]:
    """A flag for each layer of Gemma 3: True where it slides, by default all but each sixth."""
    key = "attention.sliding_window_pattern"
    flags = keys.vector(key) if keys.is_list(key) else None
    if flags is None:
        period = keys.integer(key, 6, least=1)
        return [bool((layer + 1) % period) for layer in range(num_layers)]
    if len(flags) != num_layers:
        raise UnsupportedModelError(
            f"{keys.path}: {keys.prefix}{key} has {len(flags)} flags for {num_layers} layers: "
            f"{REMEDY}"
        )
    return [bool(flag) for flag in flags]


ARCHITECTURES = {
    "llama": Architecture(_llama, pairs_interleaved=True),
    "qwen2": Architecture(_qwen("qwen2")),
    "qwen3": Architecture(_qwen("qwen3"), dict(NORMS_OF_HEADS)),
    "phi3": Architecture(
        _phi3, {**FUSED, "attn_q": None, "attn_k": None, "attn_v": None, "ffn_gate": None}
    ),
    "gemma2": Architecture(_gemma2, dict(NORMS_AFTER), norms_plus_one=True),
    "gemma3": Architecture(_gemma3, {**NORMS_AFTER, **NORMS_OF_HEADS}, norms_plus_one=True),
}
