"""A calibration of the model that vLLM loaded, made and kept as `LLM` makes and keeps it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.tokenizers import cached_tokenizer_from_config

from spectral_paged.integrations.vllm.layers import PagedLayers
from spectral_paged.integrations.vllm.weights import attention_layers
from spectral_paged.models.calibration import (
    Recorder,
    calibrated_positions,
    find_calibration,
)
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import PageFormat, SharedBasis


class RecordingPass:
    """A pass over one span of text that attends exactly and records statistics."""

    def __init__(self, recorder: Recorder, num_tokens: int, scale: float) -> None:
        self.num_tokens = num_tokens
        self._recorder, self._scale = recorder, scale

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return self._recorder.attend(layer, q, k, v, self._scale)[0]


def layer_calibration(
    given: str,
    format: PageFormat,
    config: VllmConfig,
    model: nn.Module,
    layers: PagedLayers,
    device: torch.device,
    without_adapters: Callable[[int], None],
) -> SharedBasis | Literal["online"] | None:
    """Find or make the calibration that `format` needs, of the model without adapters.

    Args:
        given: `PageOptions.calibration`.
        without_adapters: is called before each pass, with its number of tokens: layers that take
            adapters read whose tokens they get from tensors of their own.

    Returns:
        None for a format that needs none.

    Raises:
        InvalidRequestError: no such file, no tokenizer, or quantized weights.
        FormatError, CorruptFileError: the file is of another model, or damaged.
    """
    if not format.needs_calibration:
        return None
    if given == "online":
        return "online"
    names = dict(config.compilation_config.static_forward_context)

    def forward(ids: Tensor, recorder: Recorder) -> None:
        num_tokens = ids.shape[1]
        without_adapters(num_tokens)
        step = RecordingPass(recorder, num_tokens, layers.softmax_scale)
        with set_forward_context(
            dict.fromkeys(names, step),
            config,
            num_tokens=num_tokens,
            slot_mapping={},
            skip_compiled=True,  # spans have a length that no compiled range need cover
        ):
            model(input_ids=ids[0], positions=torch.arange(num_tokens, device=device))

    loaded = _loaded(config, model, device)
    ropes = layers.ropes(device, calibrated_positions(loaded.geometry))
    return find_calibration(given, format, loaded, forward=forward, ropes=ropes)


def _loaded(config: VllmConfig, model: Any, device: torch.device) -> LoadedModel:
    """The model as calibration knows models, which are those of transformers."""
    hf = config.model_config.hf_text_config
    geometry = ModelGeometry.from_config(hf)
    skips = config.model_config.skip_tokenizer_init
    return LoadedModel(
        name=str(config.model_config.model),
        model=SimpleNamespace(
            config=hf,
            device=device,
            dtype=config.model_config.dtype,
            model=SimpleNamespace(layers=attention_layers(model)),
        ),
        tokenizer=None if skips else cached_tokenizer_from_config(config.model_config),
        geometry=geometry,
    )
