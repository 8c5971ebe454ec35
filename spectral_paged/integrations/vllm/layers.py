"""A vLLM model's attention layers, as the cache needs to know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from spectral_paged.errors import UnsupportedModelError
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.rope import RotaryTable


@dataclass(frozen=True)
class PagedLayers:
    """The attention layers of a model, in order, and what they have in common.

    Attributes:
        modules: vLLM's `Attention` of each layer; each gets its number as `spectral_layer`.
        rotaries: the module that rotates each layer's q and k; None: nothing does.
        windows: tokens that a query of each layer sees, its own included; None: all before it.
    """

    modules: tuple[Any, ...]
    rotaries: tuple[Any, ...]
    windows: tuple[int | None, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any, geometry: ModelGeometry) -> PagedLayers:
        """Number the attention layers of `model` and read them.

        Raises:
            UnsupportedModelError: layers differ in shape, scale or cap, or a layer has a K and V
                that is not its own.
        """
        found = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, Attention)
        ]
        if len(found) != geometry.num_layers:
            raise UnsupportedModelError(
                f"the model has {len(found)} attention layers, its config {geometry.num_layers}: "
                "take a decoder whose layers all attend"
            )
        shapes = {
            (m.num_heads, m.num_kv_heads, m.head_size, m.impl.scale, m.impl.logits_soft_cap)
            for _, m in found
        }
        if len(shapes) > 1:
            raise UnsupportedModelError(
                f"layers differ in heads, width, scale or cap ({sorted(map(str, shapes))}); one "
                "cache has one shape: take a model of another family"
            )
        for number, (_, module) in enumerate(found):
            module.spectral_layer = number
        rotaries = [
            getattr(model.get_submodule(name.rpartition(".")[0]), "rotary_emb", None)
            if turns
            else None
            for (name, _), turns in zip(found, geometry.rotates, strict=True)
        ]
        num_q_heads, num_kv_heads, head_dim, scale, softcap = shapes.pop()
        return cls(
            modules=tuple(module for _, module in found),
            rotaries=tuple(rotaries),
            windows=tuple(module.impl.sliding_window for _, module in found),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            softmax_scale=scale,
            softcap=softcap,
        )

    def ropes(self, device: torch.device, max_positions: int) -> list[RotaryTable | None]:
        """Return each layer's rotary table of at most `max_positions`, in fp32; layers with one
        module have one table.

        vLLM keeps cos and sin in the model's dtype; they are computed again here, because keys are
        rotated back by them.

        Raises:
            UnsupportedModelError: the module makes no table of cos and sin by position.
        """
        tables: dict[int, RotaryTable] = {}
        for rotary in self.rotaries:
            if rotary is not None and id(rotary) not in tables:
                tables[id(rotary)] = _table(rotary, max_positions).to(device)
        return [None if rotary is None else tables[id(rotary)] for rotary in self.rotaries]


def _table(rotary: Any, max_positions: int) -> RotaryTable:
    try:
        rows = rotary._compute_cos_sin_cache()[:max_positions].float()
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(rotary).__name__} has no table of cos and sin by position: take a model with "
            "RoPE of type default, linear, llama3 or yarn"
        ) from error
    half = rows.shape[-1] // 2
    return RotaryTable(
        rows[:, :half].contiguous(), rows[:, half:].contiguous(), not rotary.is_neox_style
    )
