"""Adapters on disk, requests that name them, and what merged models say."""

from __future__ import annotations

import pytest

from spectral_paged import LoRARequest
from support.lora_adapters import (
    NAMES,
    PROMPTS,
    greedy,
    merged_model,
    save_kinds,
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_kinds(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def requests(paths):
    named = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(paths.items(), start=1)
    }
    return {None: None} | named


@pytest.fixture(scope="module")
def want(paths):
    """What each merged model says to each prompt, by transformers."""
    models = {name: merged_model(paths.get(name)) for name in NAMES}
    return {name: greedy(model, PROMPTS, 8) for name, model in models.items()}
