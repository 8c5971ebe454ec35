"""Unsloth on a GPU: `python -m pytest tests/unsloth_gpu_cases.py`, where Unsloth is installed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import unsloth  # noqa: F401  before transformers
from unsloth_checkpoints import adapters, batch, checkpoint, decode_logits, distance, generate

# isort: split
import torch

from spectral_paged.benchmarks.unsloth_models import load_fast
from spectral_paged.integrations.unsloth import patch_unsloth_attention
from spectral_paged.integrations.unsloth_families import FAMILIES
from spectral_paged.integrations.unsloth_graphs import GRAPHED

pytestmark = pytest.mark.gpu
WIDE = {"hidden_size": 256, "head_dim": 64}


def fast_model(family):
    folder = checkpoint(Path(tempfile.mkdtemp()), family, **WIDE)
    return load_fast(folder, dtype=torch.bfloat16, max_seq_length=4096, device="cuda")


def on_gpu(lengths):
    return {name: x.cuda() for name, x in batch(lengths).items()}


def patched(model, **options):
    defaults = {"kv_cache_bytes": 256 << 20, "max_num_seqs": 8, "verbose": False}
    return patch_unsloth_attention(model, **(defaults | options))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_graphs_and_eager_steps_say_what_the_unpatched_model_does(family):
    model, inputs = fast_model(family), on_gpu([40, 1300, 7, 750])
    logits = decode_logits(model, inputs).float()
    for options in ({"enforce_eager": True}, {}):
        patch = patched(model, kv_format="exact", **options)
        assert distance(decode_logits(model, inputs).float(), logits) < 0.05
        assert (patch.stats()["num_graphs"] > 0) == (family in GRAPHED and not options)
        patch.undo()
    patch = patched(model, kv_format="spectral-page", prefill_segment=512)
    assert distance(decode_logits(model, inputs).float(), logits) < 0.3
    assert patch.stats()["pages_attended"] > 0
    patch.undo()


def test_adapters_that_change_are_captured_anew():
    model, inputs = adapters(fast_model("llama")), on_gpu([40, 700])
    patch = patched(model, kv_format="exact")
    before = decode_logits(model, inputs).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.0)
    after = decode_logits(model, inputs).float()
    patch.undo()
    assert distance(after, before) > 0.01
    assert distance(decode_logits(model, inputs).float(), after) < 0.05


def test_replays_go_on_over_many_pages():
    model, inputs = fast_model("mistral"), on_gpu([700, 1200])
    expected = generate(model, inputs, 700)
    patch = patched(model, kv_format="exact")
    agreed = (generate(model, inputs, 700) == expected).float().mean()
    assert agreed > 0.5  # bf16: a tie that falls otherwise ends a row's agreement
    patch.undo()
