"""Unsloth's own code over the cache on a GPU: `pytest tests/integrations/unsloth_gpu_cases.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import unsloth  # noqa: F401  before transformers

from support.unsloth_checkpoints import adapters, batch, checkpoint, decode_logits, distance

# isort: split
import torch

from spectral_paged.integrations.unsloth import patch_unsloth_attention
from spectral_paged.integrations.unsloth.checkpoints import load_fast
from spectral_paged.integrations.unsloth.families import FAMILIES
from spectral_paged.integrations.unsloth.graphs import GRAPHED

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


def feed(model, inputs, steps=6):
    """Tokens for `decode_logits`: in bf16 a random model's own choice turns on the rounding."""
    generator = torch.Generator().manual_seed(1)
    size = len(inputs["input_ids"]), steps
    return torch.randint(3, model.config.vocab_size, size, generator=generator).cuda()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_graphs_and_eager_steps_say_what_the_unpatched_model_does(family):
    model, inputs = fast_model(family), on_gpu([40, 1300, 7, 750])
    tokens = feed(model, inputs)
    logits = decode_logits(model, inputs, tokens).float()
    for options in ({"enforce_eager": True}, {}):
        patch = patched(model, kv_format="exact", **options)
        assert distance(decode_logits(model, inputs, tokens).float(), logits) < 0.05
        assert (patch.stats()["num_graphs"] > 0) == (family in GRAPHED and not options)
        patch.undo()
    # every component in INT8: what is left out of random K and V would say nothing
    patch = patched(model, k_rank_keys=64, k_rank_values=64, prefill_segment=512)
    assert distance(decode_logits(model, inputs, tokens).float(), logits) < 0.1
    assert patch.stats()["pages_attended"] > 0
    patch.undo()


def test_adapters_that_change_are_captured_anew():
    model, inputs = adapters(fast_model("llama")), on_gpu([40, 700])
    tokens = feed(model, inputs)
    patch = patched(model, kv_format="exact")
    before = decode_logits(model, inputs, tokens).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.0)
    after = decode_logits(model, inputs, tokens).float()
    patch.undo()
    assert distance(after, before) > 0.1
    assert distance(decode_logits(model, inputs, tokens).float(), after) < 0.05


def test_replays_go_on_over_many_pages():
    model, inputs = fast_model("mistral"), on_gpu([700, 1200])
    tokens = feed(model, inputs, 700)
    logits = decode_logits(model, inputs, tokens).float()
    patch = patched(model, kv_format="exact")
    found = decode_logits(model, inputs, tokens).float()
    errors = (found - logits).norm(dim=-1) / logits.norm(dim=-1)
    assert errors.median() < 0.05 and errors[-50:].median() < 0.05
    patch.undo()
