"""The adapters inside a model of PEFT: read, and taken out of its layers for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectral_paged.errors import AdapterError, UnsupportedModelError, shown
from spectral_paged.models.lora.adapter_config import MERGE, AdapterConfig
from spectral_paged.models.lora.adapter_weights import AdapterWeights, LayerAdapter


def adapted_layers(model: Any) -> dict[str, Any]:
    """Return the layers of a transformers model that have adapters in them, by name."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "base_layer")}


@dataclass(frozen=True, slots=True)
class PeftAdapters:
    """The adapters that PEFT has put into a model's layers.

    configs: those of PEFT, as plain values, by adapter.
    layers: PEFT's layers by their name in the model.
    """

    configs: Mapping[str, Mapping[str, Any]]
    layers: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any, configs: Mapping[str, Any]) -> PeftAdapters:
        """Find the adapters of a transformers model.

        Args:
            configs: its `peft_config`.

        Raises:
            UnsupportedModelError: an adapter is merged into the weights of the base.
        """
        layers = adapted_layers(model)
        for name, layer in layers.items():
            if getattr(layer, "merged", False):
                raise UnsupportedModelError(
                    f"{name} has an adapter merged into its weights: call unmerge_adapter() first"
                )
        return cls({name: _plain(config) for name, config in configs.items()}, layers)

    def read(self, max_lora_rank: int) -> dict[str, AdapterWeights]:
        """Return copies of all adapters, on the CPU.

        Raises:
            AdapterError: one is not served.
        """
        found = {}
        for name, config in self.configs.items():
            AdapterConfig.of(name, config, max_lora_rank)
            layers = {
                where: _layer(name, where, part)
                for where, part in self.layers.items()
                if name in getattr(part, "lora_A", ())
            }
            found[name] = AdapterWeights.of(name, layers)
        return found

    def refused(self) -> UnsupportedModelError:
        """Return the error of a model with adapters where none are to be served."""
        return UnsupportedModelError(
            f"the model has adapters ({', '.join(map(shown, self.configs))}) in {len(self.layers)} "
            "layers, which may change between requests while their tokens stay cached: give "
            "from_model what PeftModel.merge_and_unload() returns, or pass enable_lora=True, and "
            "requests name an adapter by LoRARequest"
        )

    def take_out(self, model: Any) -> None:
        """Put the base of each layer into its place."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer.base_layer)

    def put_back(self, model: Any) -> None:
        """Undo `take_out`."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)


def _plain(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def _layer(name: str, where: str, part: Any) -> LayerAdapter:
    if not isinstance(part.base_layer, nn.Linear) or part.lora_variant.get(name) is not None:
        raise AdapterError(
            f"adapter {shown(name)} is in {where} in a form that is not served: {MERGE}"
        )
    a, b = part.lora_A[name].weight, part.lora_B[name].weight
    return LayerAdapter(
        a.detach().cpu().clone(), b.detach().cpu().clone(), float(part.scaling[name])
    )
