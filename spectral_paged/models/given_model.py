"""A model and a tokenizer that a caller loaded are checked before an LLM is made over them."""

from __future__ import annotations

from os import PathLike
from typing import Any

from spectral_paged.errors import InvalidRequestError, UnsupportedModelError, shown
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel


def given_model(model: Any, tokenizer: Any) -> LoadedModel:
    """Return a causal LM of transformers, in eval mode, with its tokenizer (or None).

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
    if hasattr(model, "merge_and_unload") or hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"the model has adapters around it ({kind}), which may change between requests while "
            "their tokens stay cached: give from_model what model.merge_and_unload() returns (or "
            "model.get_base_model() of one without adapters)"
        )
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
    if adapted := [name for name, part in model.named_modules() if hasattr(part, "base_layer")]:
        raise UnsupportedModelError(
            f"{adapted[0]} and {len(adapted) - 1} other layers have adapters in them: merge them "
            "with PeftModel.merge_and_unload() and give from_model what it returns"
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
    return LoadedModel(type(model).__name__, model.eval(), tokenizer, geometry)
