"""The tensors of one LoRA adapter, by the linear layers that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.errors import AdapterError, cut, shown

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """A `[r, in]` and B `[out, r]` of one linear layer; its output changes by `scale` B A x."""

    a: Tensor
    b: Tensor
    scale: float

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A `[r, in]` and `scale` B^T `[r, out]` in another dtype, contiguous."""
        scaled = (self.b.float() * self.scale).t()
        return self.a.to(dtype).contiguous(), scaled.to(dtype).contiguous()


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter: what it adds to each linear layer, by the layer's name in the model.

    digest: 64 hex digits of names, bits and scales.
    """

    layers: Mapping[str, LayerAdapter]
    digest: str

    @classmethod
    def of(cls, name: str, layers: Mapping[str, LayerAdapter]) -> AdapterWeights:
        """Check tensors, which are on the CPU, and digest them.

        Args:
            name: of the adapter, for errors.

        Raises:
            AdapterError: there are none, shapes of A and B differ, numbers are no floats, or one
                is not finite.
        """
        if not layers:
            raise AdapterError(
                f"adapter {shown(name)} has no tensors of linear layers: train one that has"
            )
        digest = hashlib.sha256()
        for where, layer in sorted(layers.items()):
            shapes = tuple(layer.a.shape), tuple(layer.b.shape)
            check_pair(name, where, *shapes)
            digest.update(f"{where} {shapes} {layer.scale!r}".encode())
            for tensor in (layer.a, layer.b):
                if tensor.dtype not in DTYPES:
                    raise AdapterError(
                        f"adapter {shown(name)} has {tensor.dtype} in {cut(where)}: give it one of "
                        f"{', '.join(map(str, DTYPES))}"
                    )
                if not torch.isfinite(tensor).all():
                    raise AdapterError(
                        f"adapter {shown(name)} has NaN or Inf in {cut(where)}: train it again, or "
                        "take an earlier checkpoint"
                    )
                raw = tensor.detach().contiguous().flatten().view(torch.uint8)
                digest.update(f"{tensor.dtype}".encode())
                digest.update(raw.numpy().data)
        return cls(dict(layers), digest.hexdigest())

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(layer.a) for layer in self.layers.values())


def check_pair(name: str, where: str, a: Sequence[int], b: Sequence[int]) -> int:
    """Return the rank of A and B, by their shapes.

    Raises:
        AdapterError: they have none in common.
    """
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise AdapterError(
            f"adapter {shown(name)}: {cut(where)} has lora_A {shown(list(a))} and lora_B "
            f"{shown(list(b))}, which have no rank in common: save the adapter again"
        )
    return a[0]
