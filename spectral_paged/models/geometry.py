"""What the cache must know of a model, read from its config; refusals for what is not served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectral_paged.errors import UnsupportedModelError
from spectral_paged.rope import RotaryTable

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Shapes of a decoder: `num_layers` layers, grouped-query heads of width `head_dim`."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any) -> ModelGeometry:
        """Read and check a transformers config.

        Raises:
            UnsupportedModelError: another family, sliding-window layers, soft-capped scores, or
                a RoPE whose table depends on the sequence's length.
        """
        family = config.model_type
        if family not in FAMILIES:
            raise UnsupportedModelError(
                f"model family {family!r} is not supported; this version serves "
                f"{', '.join(FAMILIES)}: take a model of one of them"
            )
        layer_types = getattr(config, "layer_types", None) or []
        window = getattr(config, "sliding_window", None)
        slides = "sliding_attention" in layer_types
        if family not in ("qwen2", "qwen3"):  # their layers slide by layer_types alone
            slides = slides or bool(window and window < config.max_position_embeddings)
        if slides:
            raise UnsupportedModelError(
                f"{family} with sliding-window layers (window {window}) is not supported in this "
                "version: use a model with full attention in every layer"
            )
        cap = getattr(config, "attn_logit_softcapping", None)
        if cap is not None:
            raise UnsupportedModelError(
                f"attn_logit_softcapping {cap} is not supported in this version: use a model "
                "without soft-capped attention scores"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"RoPE type {rope_type!r} changes its table with the sequence's length, so pages "
                f"could not be shared; supported are {', '.join(ROPE_TYPES)}: set one of them in "
                "the config's rope_parameters (default serves the original length)"
            )
        num_q_heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_q_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_q_heads,
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
        )


def rotary_table(model: Any, max_positions: int, device: torch.device) -> RotaryTable:
    """The model's own rotary table: its inverse frequencies and attention factor."""
    rotary = model.model.rotary_emb
    return RotaryTable.from_inv_freq(
        rotary.inv_freq,
        max_positions=max_positions,
        attention_scaling=float(rotary.attention_scaling),
        device=device,
    )
