"""A model's shapes, sliding windows and RoPE are read from its config, or the model is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectral_paged.errors import UnsupportedModelError
from spectral_paged.models.refused_families import limit_of
from spectral_paged.rope import RotaryTable

EXPERTS = (  # mixtures of experts
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "gpt_oss",
)
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "gemma",
    "gemma2",
    "gemma3_text",
    "cohere",
    "cohere2",
    "phi3",
    "olmo2",
    "smollm3",
    "olmo3",
    "exaone4",
    "glm4",
    "seed_oss",
    "ministral",
    *EXPERTS,
)
INTERLEAVED = ("cohere", "cohere2", "glm4")  # rotate dimensions 2i and 2i + 1
SINKS = ("gpt_oss",)  # families whose attention has a learned sink a head
CAPPED = ("gemma2",)  # families whose attention takes attn_logit_softcapping
# all layers have the window, whatever layer_types contain
ALL_SLIDE = ("mistral", "phi3", "mixtral", "qwen3_moe")
SCALED_TYPES = ("linear", "yarn")  # whose factor lengthens the longest sequence
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Shapes of a decoder: `num_layers` layers, grouped-query heads of width `head_dim`.

    Attributes:
        max_position_embeddings: tokens of the longest sequence, those that linear RoPE or YaRN add
            included.
        windows: tokens that a query of each layer sees, its own included; None: all before it.
        rotates: True for each layer that rotates queries and keys.
        softcap: the cap of attention scores; None: they are not capped.
        has_experts: a token's MLP is that of a few experts, which a router chooses.
        has_sinks: each head has a score without a token, which takes a part of every softmax.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    vocab_size: int
    windows: tuple[int | None, ...]
    rotates: tuple[bool, ...]
    softcap: float | None
    has_experts: bool = False
    has_sinks: bool = False

    @classmethod
    def from_config(cls, config: Any) -> ModelGeometry:
        """Read and check a transformers config.

        Raises:
            UnsupportedModelError: the family is not served, attention is not causal, scores are
                capped where transformers caps none, or RoPE's table depends on the sequence's
                length.
        """
        family = config.model_type
        if family not in FAMILIES:
            limit = limit_of(family)
            reason = "" if limit is None else f" ({limit})"
            raise UnsupportedModelError(
                f"model family {family!r} is not supported{reason}; this version serves "
                f"{', '.join(FAMILIES)}: take a model of one of them"
            )
        if getattr(config, "use_bidirectional_attention", False):
            raise UnsupportedModelError(
                "use_bidirectional_attention lets tokens see later ones, which a cache cannot have "
                "yet: take a causal model"
            )
        cap = getattr(config, "attn_logit_softcapping", None)
        if cap is not None and family not in CAPPED:
            raise UnsupportedModelError(
                f"attn_logit_softcapping {cap} is set, but transformers' {family} caps no scores: "
                "remove it from the config, or take a gemma2 model"
            )
        for rope in _rope_parameters(config):
            rope_type = rope.get("rope_type", "default")
            if rope_type not in ROPE_TYPES:
                raise UnsupportedModelError(
                    f"RoPE type {rope_type!r} changes its table with the sequence's length, so "
                    f"pages could not be shared; supported are {', '.join(ROPE_TYPES)}: set one of "
                    "them in the config's rope_parameters (default serves the original length)"
                )
        num_layers, num_q_heads = config.num_hidden_layers, config.num_attention_heads
        return cls(
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_q_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_q_heads,
            max_position_embeddings=_longest(config),
            vocab_size=config.vocab_size,
            windows=_windows(config),
            rotates=_rotates(config),
            softcap=cap,
            has_experts=family in EXPERTS,
            has_sinks=family in SINKS,
        )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the config's RoPE parameters: one set, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    return nested or [rope]


def _longest(config: Any) -> int:
    """Return the tokens of the longest sequence, as vLLM counts them.

    Linear RoPE and YaRN multiply positions by their factor, YaRN those of its original length; a
    config that has more positions already keeps them. Configs with a set for each type of layer
    (Gemma 3) count them already.
    """
    longest: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    factor, kind = rope.get("factor"), rope.get("rope_type", "default")
    if kind not in SCALED_TYPES or factor is None:
        return longest
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(longest, int((original or longest) * factor))


def _slides(config: Any) -> list[bool]:
    if config.model_type in ALL_SLIDE:
        return [True] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in types]


def _windows(config: Any) -> tuple[int | None, ...]:
    """Return each layer's sliding window; None: the layer has none, or no position reaches it."""
    window = getattr(config, "sliding_window", None)
    reached = window is not None and window < _longest(config)
    return tuple(window if slides and reached else None for slides in _slides(config))


def _rotates(config: Any) -> tuple[bool, ...]:
    """Return True for each layer that rotates queries and keys; all do, but for three families."""
    if config.model_type == "smollm3":
        return tuple(bool(turned) for turned in config.no_rope_layers)
    if config.model_type == "cohere2":  # layers with a sliding window
        return tuple(slides and config.sliding_window is not None for slides in _slides(config))
    if config.model_type == "exaone4" and config.sliding_window is not None:
        return tuple(_slides(config))
    return (True,) * config.num_hidden_layers


def layer_ropes(model: Any, max_positions: int, device: torch.device) -> list[RotaryTable | None]:
    """Return each layer's rotary table, or None for a layer without rotation.

    The tables have the model's own inverse frequencies and attention factor.
    """
    config, rotary = model.config, model.model.rotary_emb
    turns = ModelGeometry.from_config(config).rotates
    by_type = hasattr(rotary, "layer_types")
    kinds = config.layer_types if by_type else [""] * config.num_hidden_layers
    tables: dict[str, RotaryTable] = {}
    for kind in dict.fromkeys(kinds):
        name = f"{kind}_" if by_type else ""
        tables[kind] = RotaryTable.from_inv_freq(
            getattr(rotary, f"{name}inv_freq"),
            max_positions=max_positions,
            attention_scaling=float(getattr(rotary, f"{name}attention_scaling")),
            interleaved=config.model_type in INTERLEAVED,
            device=device,
        )
    return [tables[kind] if turned else None for kind, turned in zip(kinds, turns, strict=True)]


def rotary_table(model: Any, max_positions: int, device: torch.device) -> RotaryTable:
    """Return the one half-split rotary table that all layers of a model share.

    Raises:
        UnsupportedModelError: the layers differ, or their pairs are interleaved.
    """
    tables = set(layer_ropes(model, max_positions, device))
    table = tables.pop()
    if tables or table is None or table.interleaved:
        raise UnsupportedModelError(
            f"layers of {model.config.model_type} are not all turned by one table with pairs in "
            "halves, which this needs: take a model of another family"
        )
    return table
