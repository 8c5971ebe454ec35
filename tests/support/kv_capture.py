"""Queries, keys and values of a model over text, captured by hooks on its projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_paged.errors import InvalidRequestError
from spectral_paged.models.geometry import rotary_table
from spectral_paged.models.loader import LoadedModel
from spectral_paged.rope import RotaryTable


@dataclass(frozen=True, slots=True)
class CapturedKV:
    """Queries, keys and values of every layer before RoPE, fp32.

    `q` `[layers, Hq, tokens, D]`, `k` and `v` `[layers, Hkv, tokens, D]`; `scale`: of scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rope: RotaryTable
    scale: float


@torch.inference_mode()
def capture(loaded: LoadedModel, text: str, num_tokens: int) -> CapturedKV:
    """Run a model over the first `num_tokens` tokens of `text` and return q, k and v.

    Raises:
        InvalidRequestError: the text has fewer tokens.
    """
    ids = loaded.tokenizer(text)["input_ids"][:num_tokens]
    if len(ids) < num_tokens:
        raise InvalidRequestError(f"the text has {len(ids)} tokens, {num_tokens} are needed")
    kept: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    handles = []
    geometry = loaded.geometry

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            heads = output.reshape(num_tokens, -1, geometry.head_dim)
            kept[name].append(heads.transpose(0, 1).float())

        return hook

    for layer in loaded.model.model.layers:
        attention = layer.self_attn
        for name in kept:
            # qwen3 normalises each head of q and k between projection and rotation
            last = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            handles.append(last.register_forward_hook(keep(name)))
    try:
        loaded.model(torch.tensor([ids], device=loaded.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    q, k, v = (torch.stack(kept[name]) for name in ("q", "k", "v"))
    rope = rotary_table(loaded.model, num_tokens, loaded.model.device)
    return CapturedKV(q, k, v, rope, float(loaded.model.model.layers[0].self_attn.scaling))
