"""Unsloth's attention functions by model family, and the versions and models that are refused."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from spectral_paged.errors import UnsupportedModelError

# The releases that were read and run, because Unsloth moves functions between releases.
OLDEST, NEWEST = "2026.10.9", "2026.10.9"
# functions that attention of prompts calls with rotated q, k and v
KERNELS = (
    "run_attention",
    "slow_attention_softcapping",
    "slow_inference_attention_softcapping",
)


@dataclass(frozen=True, slots=True)
class Family:
    """The place of a family's attention in `unsloth.models`.

    Attributes:
        module: the family's module.
        prefill: the function in it that is the attention's `forward`.
        decode: the function in it that attends for one new token a row; None where Unsloth leaves
            the family to transformers, so that prefill and decode pass the attention interface.
    """

    module: str
    prefill: str = ""
    decode: str | None = None

    @property
    def is_fast(self) -> bool:
        """True if Unsloth has attention functions for the family."""
        return self.decode is not None


LLAMA_DECODE = "LlamaAttention_fast_forward_inference"
FAMILIES = {
    "llama": Family("llama", "LlamaAttention_fast_forward", LLAMA_DECODE),
    "mistral": Family("mistral", "MistralAttention_fast_forward", LLAMA_DECODE),
    "gemma": Family("gemma", "LlamaAttention_fast_forward", LLAMA_DECODE),
    "gemma2": Family(
        "gemma2", "Gemma2Attention_fast_forward", "Gemma2Attention_fast_forward_inference"
    ),
    "qwen2": Family("qwen2", "LlamaAttention_fast_forward", LLAMA_DECODE),
    "qwen3": Family(
        "qwen3", "Qwen3Attention_fast_forward", "Qwen3Attention_fast_forward_inference"
    ),
    "cohere": Family("cohere"),
    "granite": Family("granite"),
}


def loaded_unsloth() -> ModuleType:
    """The imported `unsloth` module, of a supported version.

    Raises:
        UnsupportedModelError: it is not imported, so it loaded no model here, or it has another
            version.
    """
    package = sys.modules.get("unsloth")
    if package is None:
        raise UnsupportedModelError(
            "unsloth is not imported, so it loaded no model here: import it first, and load the "
            "model with FastLanguageModel.from_pretrained (a transformers model goes to LLM)"
        )
    version = str(getattr(package, "__version__", "unknown"))
    if not _number(OLDEST) <= _number(version) <= _number(NEWEST):
        raise UnsupportedModelError(
            f"unsloth {version} is not supported: its attention functions are known from "
            f"{OLDEST} to {NEWEST}; pip install --no-deps unsloth=={NEWEST} unsloth_zoo=={NEWEST}"
        )
    return package


def _number(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) if part.isdigit() else -1 for part in parts)


def causal_lm(model: Any) -> Any:
    """The transformers causal LM inside `model`, without adapters of PEFT around it.

    Raises:
        UnsupportedModelError: `model` is not a causal LM of decoder layers.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(getattr(inner, "model", None), "layers", None)
    if layers is None or not hasattr(inner, "lm_head"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no causal language model of decoder layers: give the model "
            "that FastLanguageModel.from_pretrained or get_peft_model returned"
        )
    return inner


def family_of(model: Any) -> Family:
    """The family of a causal LM that Unsloth loaded.

    Raises:
        UnsupportedModelError: the family is another one, Unsloth did not load the model, it lies on
            several devices, or its attention is not the function expected of this version.
    """
    name = model.config.model_type
    family = FAMILIES.get(name)
    if family is None:
        raise UnsupportedModelError(
            f"model family {name!r} is not supported with unsloth; supported are "
            f"{', '.join(FAMILIES)}: take a model of one of them"
        )
    attentions = [layer.self_attn for layer in model.model.layers]
    devices = sorted({str(attention.o_proj.weight.device) for attention in attentions})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model lies on {', '.join(devices)}; the cache is on one device: load it with "
            'device_map={"": 0}'
        )
    # Unsloth's class methods run only with this mark, so a transformers model keeps its own
    fast = getattr(attentions[0], "_unsloth_fast_path", False)
    forward = inspect.unwrap(type(attentions[0]).forward)
    expected = getattr(unsloth_module(family.module), family.prefill) if family.is_fast else None
    if family.is_fast and not (fast and forward is expected):
        raise UnsupportedModelError(
            f"this {name} model does not attend by unsloth.models.{family.module}."
            f"{family.prefill}: load it with FastLanguageModel.from_pretrained and without "
            "fast_inference=True (vLLM)"
        )
    if not family.is_fast and fast:
        raise UnsupportedModelError(
            f"Unsloth's own {name} path is switched off by Unsloth itself, because it differs from "
            "transformers: load the model with FastLanguageModel.from_pretrained"
        )
    return family


def unsloth_module(name: str) -> ModuleType:
    """The module `unsloth.models.<name>`, imported if necessary."""
    return importlib.import_module(f"unsloth.models.{name}")


def fast_modules() -> list[ModuleType]:
    """The modules of `unsloth.models` whose functions are replaced."""
    return [unsloth_module(family.module) for family in FAMILIES.values() if family.is_fast]


def fast_functions() -> dict[str, Callable[..., Any]]:
    """The functions to replace, by name: attention of one-token steps, and kernels of prefill."""
    found: dict[str, Callable[..., Any]] = {}
    for module in fast_modules():
        for name in {f.decode for f in FAMILIES.values() if f.decode} | set(KERNELS):
            if name in vars(module):
                found.setdefault(name, vars(module)[name])
    return found
