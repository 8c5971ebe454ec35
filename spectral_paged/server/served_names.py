"""The names that a request may give as its model: those of the model, and of its adapters."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_paged.errors import AdapterError, InvalidRequestError, shown
from spectral_paged.llm import LLM
from spectral_paged.models.lora import of_llm
from spectral_paged.options import LoRARequest
from spectral_paged.server.api_error import ApiError
from spectral_paged.server.settings import ServerSettings


def served_names(llm: LLM, settings: ServerSettings) -> list[str]:
    """Return all names, those of the model itself first."""
    return [*settings.model_names, *(request.lora_name for request in llm.list_loras())]


def lora_of(llm: LLM, settings: ServerSettings, name: str | None) -> LoRARequest | None:
    """Return the name and id of the adapter that a request names; None: the model itself.

    Raises:
        ApiError: 404, nothing here has the name.
    """
    if name is None or name in settings.model_names:
        return None
    try:
        return of_llm(llm.adapters).named(name)
    except AdapterError:
        raise unknown_model(llm, settings, name) from None


def unknown_model(llm: LLM, settings: ServerSettings, name: str) -> ApiError:
    return ApiError(
        404,
        f"model {shown(name)} is not served here: this server has "
        f"{', '.join(map(repr, served_names(llm, settings)))}",
        param="model",
        code="model_not_found",
    )


def check_names(settings: ServerSettings, adapters: Sequence[str], *, enable_lora: bool) -> None:
    """Refuse adapters that cannot be told from the model, and a switch without effect.

    Raises:
        AdapterError: an adapter has a name of the model.
        InvalidRequestError: adapters may be loaded while there is room for none.
    """
    if settings.allow_runtime_lora_updating and not enable_lora:
        raise InvalidRequestError(
            "--allow-runtime-lora-updating needs --enable-lora: give both, or neither"
        )
    for name in adapters:
        if name in settings.model_names:
            raise AdapterError(
                f"adapter {shown(name)} has a name of the model: give another name, or give the "
                "model another one by --served-model-name"
            )
