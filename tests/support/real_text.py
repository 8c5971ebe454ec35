"""Real text and real K and V of the embedded model, for tests of quality."""

from __future__ import annotations

import functools

import torch

from spectral_paged.models.loader import LoadedModel, load_model
from support.kv_capture import CapturedKV, capture
from support.paths import TEXTS


def text(name: str) -> str:
    return (TEXTS / f"{name}.txt").read_text(encoding="utf-8")


@functools.cache
def smollm2() -> LoadedModel:
    """The embedded model, fp32, with transformers' own attention."""
    return load_model("smollm2-135m", device=torch.device("cpu"), dtype=torch.float32)


@functools.cache
def smollm2_kv() -> CapturedKV:
    """q, k, v before RoPE of 1,088 tokens: landmarks and two blocks."""
    return capture(smollm2(), text("sherlock_holmes"), 1088)
