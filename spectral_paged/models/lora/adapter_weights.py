"""The tensors of one LoRA adapter, by the linear layers that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.errors import AdapterError, shown


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """A `[r, in]` and B `[out, r]` of one linear layer; its output changes by `scale` B A x."""

    a: Tensor
    b: Tensor
    scale: float


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
            AdapterError: there are none, shapes of A and B differ, or a number is not finite.
        """
        if not layers:
            raise AdapterError(
                f"adapter {shown(name)} has no tensors of linear layers: train one that has"
            )
        digest = hashlib.sha256()
        for where, layer in sorted(layers.items()):
            shapes = tuple(layer.a.shape), tuple(layer.b.shape)
            if layer.a.dim() != 2 or layer.b.dim() != 2 or len(layer.a) != layer.b.shape[1]:
                raise AdapterError(
                    f"adapter {shown(name)}: {where} has lora_A {list(shapes[0])} and lora_B "
                    f"{list(shapes[1])}, which have no rank in common: save the adapter again"
                )
            digest.update(f"{where} {shapes} {layer.scale!r}".encode())
            for tensor in (layer.a, layer.b):
                if not torch.isfinite(tensor).all():
                    raise AdapterError(
                        f"adapter {shown(name)} has NaN or Inf in {where}: train it again, or take "
                        "an earlier checkpoint"
                    )
                raw = tensor.detach().contiguous().flatten().view(torch.uint8)
                digest.update(f"{tensor.dtype}".encode())
                digest.update(raw.numpy().data)
        return cls(dict(layers), digest.hexdigest())

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(layer.a) for layer in self.layers.values())
