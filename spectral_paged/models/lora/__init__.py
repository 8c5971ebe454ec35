"""LoRA adapters: read as PEFT saves them, and added to the linear layers of a running model.

The package knows modules and tensors; which request has which adapter is the engine's business.
"""

from __future__ import annotations

from spectral_paged.models.lora.adapter_files import (
    check_folder,
    read_folder,
)
from spectral_paged.models.lora.adapter_weights import (
    AdapterWeights,
    LayerAdapter,
)
from spectral_paged.models.lora.loaded_adapters import (
    LoadedAdapter,
    LoadedAdapters,
    of_llm,
)
from spectral_paged.models.lora.lora_linear import (
    LoRALinear,
    TokenAdapters,
)
from spectral_paged.models.lora.peft_model import (
    PeftAdapters,
    adapted_layers,
)

__all__ = [
    "AdapterWeights",
    "LayerAdapter",
    "LoRALinear",
    "LoadedAdapter",
    "LoadedAdapters",
    "PeftAdapters",
    "TokenAdapters",
    "adapted_layers",
    "check_folder",
    "of_llm",
    "read_folder",
]
