"""Calibration of a model by Unsloth's forward, for pages with a shared basis."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from spectral_paged.integrations.row_batch import without_autocast
from spectral_paged.integrations.unsloth.attention import PromptStep, run_prompt
from spectral_paged.integrations.unsloth.rotary import rotary_tables
from spectral_paged.models.calibration import Recorder, builtin_calibration, calibrated_positions
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pages import SharedBasis


class _RecordedStep(PromptStep):
    """Exact attention of a prompt that records queries, keys and values for calibration."""

    def __init__(self, recorder: Recorder, scale: float) -> None:
        self.recorder = recorder
        self.scale = scale

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with without_autocast(q.device):
            return self.recorder.attend(self.layer, q, k, v, self.scale)


def unsloth_calibration(model: Any, loaded: LoadedModel) -> SharedBasis:
    """The built-in calibration of a model, as `LLM` makes it: once, and kept in the cache folder.

    Unsloth's functions must be replaced already. Adapters are disabled, because a calibration is
    kept for the weights below them.

    Args:
        model: the model that Unsloth returned, with adapters.
        loaded: the causal LM inside.

    Raises:
        InvalidRequestError: there is no tokenizer, or weights are quantized.
    """
    inner = loaded.model
    scale = float(inner.model.layers[0].self_attn.scaling)

    def forward(ids: Tensor, recorder: Recorder) -> None:
        positions = torch.arange(ids.shape[1], device=ids.device)
        step = _RecordedStep(recorder, scale)
        run_prompt(inner, inner.forward, step, ids[0], positions, lengths=[len(positions)], keep=1)

    plain = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    training = inner.training
    inner.eval()
    try:
        with plain:
            return builtin_calibration(
                loaded,
                forward=forward,
                ropes=rotary_tables(inner, calibrated_positions(loaded.geometry)),
            )
    finally:
        inner.train(training)
