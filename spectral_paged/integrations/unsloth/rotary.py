"""The rotary tables with which Unsloth's models turn queries and keys."""

from __future__ import annotations

from typing import Any

from spectral_paged.models.geometry import layer_ropes
from spectral_paged.rope import RotaryTable


def rotary_tables(model: Any, length: int) -> list[RotaryTable | None]:
    """The rotary table of each layer, from the model's own rotary module."""
    rotary = model.model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return layer_ropes(model, length, model.device)
    # gemma and gemma2: a class that keeps only the base and the width of its frequencies
    table = RotaryTable.from_theta(
        rotary.base, rotary.dim, max_positions=length, device=model.device
    )
    return [table] * len(model.model.layers)
