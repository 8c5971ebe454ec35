"""The bodies of the routes that load and unload LoRA adapters, whose names are vLLM's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from spectral_paged.openai.bodies import unserved
from spectral_paged.openai.strict import Strict

LOAD_ADAPTER_URL, UNLOAD_ADAPTER_URL = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoadAdapterRequest(Strict):
    """The body of `/v1/load_lora_adapter`: a folder that PEFT saved, on the server's machine."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    # not served
    is_3d_lora_weight: Annotated[None, unserved(False)] = None
    load_inplace: Annotated[None, unserved(False)] = None


class UnloadAdapterRequest(Strict):
    """The body of `/v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: int | None = None  # the name says which
