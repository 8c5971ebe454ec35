"""Adapters are loaded and unloaded by HTTP, while requests of others run."""

from __future__ import annotations

from collections.abc import Callable

from spectral_paged.llm import LLM
from spectral_paged.models.lora import of_llm
from spectral_paged.openai import (
    LoadAdapterRequest,
    UnloadAdapterRequest,
    parse_json,
    read_body,
)
from spectral_paged.options import LoRARequest
from spectral_paged.server.api_error import asleep
from spectral_paged.server.served_names import check_names, lora_of, unknown_model
from spectral_paged.server.settings import ServerSettings


def read_load(llm: LLM, settings: ServerSettings, raw: bytes) -> Callable[[], str]:
    """Read the files of the adapter that a body names; return what loads it between two steps.

    Raises:
        AdapterError: it is not served or damaged, or has a name of the model.
        ApiError: 503, the server sleeps.
    """
    asked = read_body(LoadAdapterRequest, parse_json(raw))
    check_names(settings, [asked.lora_name], enable_lora=True)
    adapters = of_llm(llm.adapters)
    weights = adapters.read(LoRARequest(asked.lora_name, 1, asked.lora_path))

    def load() -> str:
        if llm.engine.sleep.parts:
            raise asleep()
        request = LoRARequest(asked.lora_name, adapters.next_id(), asked.lora_path)
        adapters.add(request, weights)
        return f"Success: LoRA adapter '{asked.lora_name}' added successfully."

    return load


def read_unload(llm: LLM, settings: ServerSettings, raw: bytes) -> Callable[[], str]:
    """Read a body; return what unloads its adapter between two steps.

    Raises:
        ApiError: 404, no adapter has the name.
    """
    asked = read_body(UnloadAdapterRequest, parse_json(raw))
    if lora_of(llm, settings, asked.lora_name) is None:
        raise unknown_model(llm, settings, asked.lora_name)

    def unload() -> str:
        of_llm(llm.adapters).remove(asked.lora_name)
        return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."

    return unload
