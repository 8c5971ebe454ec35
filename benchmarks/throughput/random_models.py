"""Models of known shapes with random weights, to measure speed; their text means nothing."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.initialization import no_init_weights

from spectral_paged.errors import UnknownModelError
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel, load_model

PREFIX = "random:"
COMMON: dict[str, Any] = {
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
}
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-3-8b": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        },
    ),
    "mistral-7b": (
        MistralConfig,
        MistralForCausalLM,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32_768,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "sliding_window": None,
        },
    ),
    "qwen2.5-7b": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
        },
    ),
    "tiny": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 512,
        },
    ),
}


def is_random(name: str) -> bool:
    return name.startswith(PREFIX)


def random_config(name: str) -> Any:
    """The config of `random:<shape>`.

    Raises:
        UnknownModelError: no such shape.
    """
    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        raise UnknownModelError(f"model {name!r}: random shapes are {', '.join(SHAPES)}")
    config_type, model_type, fields = SHAPES[shape]
    return config_type(**(COMMON | fields), architectures=[model_type.__name__])


def load_random(name: str, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The model `random:<shape>`, without weights on the meta device; raises as `random_config`
    does."""
    config = random_config(name)
    model_type = SHAPES[name.removeprefix(PREFIX)][1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = model_type(config).eval()
    finally:
        torch.set_default_dtype(before)
    if device.type == "meta":
        return LoadedModel(name, model, None, ModelGeometry.from_config(config))
    generator = torch.Generator(device=device).manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return LoadedModel(name, model, None, ModelGeometry.from_config(config))


def load_either(name: str, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The model `random:<shape>`, or one with weights; raises as `load_random` or `load_model`."""
    load = load_random if is_random(name) else load_model
    return load(name, device=device, dtype=dtype)
