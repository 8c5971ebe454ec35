"""A model and a tokenizer that a caller loaded are checked before an LLM is made over them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from spectral_paged.errors import InvalidRequestError, UnsupportedModelError, shown
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from spectral_paged.models.lora import PeftAdapters, adapted_layers


def given_model(model: Any, tokenizer: Any) -> LoadedModel:
    """Return a causal LM of transformers, in eval mode, with its tokenizer (or None).

    It may be one of PEFT, or have its adapters in it.

    Raises:
        UnsupportedModelError: the family is not served, or the model is a name or a pipeline, has
            adapters or no head, or lies on several devices or none.
        InvalidRequestError: the tokenizer cannot be called.
    """
    kind = type(model).__name__
    if isinstance(model, str | PathLike):
        raise UnsupportedModelError(
            f"from_model takes a loaded model; LLM({shown(str(model))}) loads one by its name"
        )
    configs = getattr(model, "peft_config", None)
    around = hasattr(model, "merge_and_unload") or hasattr(model, "get_base_model")
    if around:
        if not isinstance(configs, Mapping):
            raise UnsupportedModelError(
                f"the model has adapters around it ({kind}), which may change between requests "
                "while their tokens stay cached: give from_model what model.merge_and_unload() "
                "returns (or model.get_base_model() of one without adapters)"
            )
        model = model.get_base_model()
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        parts = "from_model(pipe.model, pipe.tokenizer)" if hasattr(model, "tokenizer") else ""
        raise UnsupportedModelError(
            f"from_model takes a causal LM of transformers, this is a {kind}: "
            f"{parts or 'load one with AutoModelForCausalLM.from_pretrained'}"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{kind} has no head that makes logits, and nothing but text is generated here: load "
            "the model with AutoModelForCausalLM"
        )
    peft = PeftAdapters.of(model, configs) if isinstance(configs, Mapping) else None
    if peft is not None and not peft.layers and not around:
        peft = None  # it had adapters once
    if peft is None and (adapted := adapted_layers(model)):
        raise UnsupportedModelError(
            f"{next(iter(adapted))} and {len(adapted) - 1} other layers have adapters in them: "
            "merge them with PeftModel.merge_and_unload() and give from_model what it returns, or "
            "give the PeftModel around them"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise UnsupportedModelError(
            f"the model lies on {', '.join(devices)}; an LLM has one device: load it without "
            "device_map, or with device_map='cuda:0'"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise InvalidRequestError(
            f"tokenizer is a {type(tokenizer).__name__}, which cannot be called: give "
            "AutoTokenizer.from_pretrained(name), or PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    geometry = ModelGeometry.from_config(model.config)
    return LoadedModel(type(model).__name__, model.eval(), tokenizer, geometry, peft=peft)
