"""The rotary tables by which Unsloth's models turn queries and keys."""

from __future__ import annotations

from typing import Any

from spectral_paged.models.geometry import layer_ropes
from spectral_paged.rope import RotaryTable


def rotary_tables(model: Any, length: int) -> list[RotaryTable | None]:
    """Each layer's table, of the module by which Unsloth turns its queries and keys."""
    rotary = model.model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return layer_ropes(model, length, model.device)
    # gemma and gemma2: a class that keeps only what its frequencies are made of
    table = RotaryTable.from_theta(
        rotary.base, rotary.dim, max_positions=length, device=model.device
    )
    return [table] * len(model.model.layers)
