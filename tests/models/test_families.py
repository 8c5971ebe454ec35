"""Families with layers that differ, soft caps or other rotations, against transformers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from spectral_paged import PageFormat
from spectral_paged.models.calibration import calibrate
from spectral_paged.models.geometry import ModelGeometry, layer_ropes
from spectral_paged.models.loader import LoadedModel
from support.families import (
    FAMILIES,
    LONGEST,
    build,
    generate,
    llm_of,
    reference,
)
from support.tiny_model import random_prompts

LENGTHS = [1, 63, 97, 160, 700, 1500]


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_greedy_is_transformers_generate_token_for_token(name):
    model, prompts = build(name), random_prompts(LENGTHS, seed=1)
    want = reference(model, prompts)
    assert len({tuple(w) for w in want}) == len(prompts)
    llm = llm_of(model, kv_format="exact", max_num_batched_tokens=600)
    assert generate(llm, prompts) == want
    assert llm.stats()["preemptions"] == 0


def forced(model, tokens, num_prompt_tokens, **options):
    """Logits fp32 at the prompt's last token and at every later one, all tokens given; and the
    LLM."""
    llm = llm_of(model, max_num_seqs=2, **options)
    cache, runner = llm.cache, llm.engine.runner
    cache.add_sequence("s", num_prompt_tokens=num_prompt_tokens)
    found, at = [], 0
    while at < len(tokens):
        count = max(1, min(num_prompt_tokens - at, cache.chunk_limit("s"), 300))
        plan = cache.reserve({"s": count})
        cache.begin_step(plan)
        logits = runner.forward(plan, tokens[at : at + count], [count - 1]).clone()
        assert not cache.end_step().failed
        at += count
        if at >= num_prompt_tokens:
            found.append(logits[0])
    cache.check_integrity()
    return torch.stack(found), llm


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_has_the_models_own_table(name):
    """What a rotation by it gives is what the model's attention gets."""
    model, seen = build(name), {}

    def note(module, query, key, value, mask, **options):
        seen[module.layer_idx] = (key[0].transpose(0, 1), options.get("sliding_window"))
        return torch.zeros_like(query.transpose(1, 2)), None  # what follows knows no position

    tf.AttentionInterface.register("noting", note)
    model.set_attn_implementation("noting")
    ids, keys = torch.tensor([[5]]), []
    for first in (0, 1000):
        with torch.no_grad():
            model(ids, position_ids=torch.tensor([[first]]), use_cache=False)
        keys.append({layer: key for layer, (key, _) in seen.items()})
    tables = layer_ropes(model, LONGEST, torch.device("cpu"))
    for layer, table in enumerate(tables):
        at_start, later = keys[0][layer], keys[1][layer]
        if table is None:
            assert torch.equal(at_start, later)
            continue
        assert not torch.equal(at_start, later)
        plain = table.undo(at_start, torch.tensor([0]))
        assert torch.allclose(table.apply(plain, torch.tensor([1000])), later, atol=1e-3)
        assert torch.allclose(table.undo(later, torch.tensor([1000])), plain, atol=1e-3)
    windows = ModelGeometry.from_config(model.config).windows
    assert [seen[layer][1] for layer in range(2)] == list(windows)


def full_rank(rope):
    """Every component in eight bits: what is left of an error is rounding, and wrong rotation."""
    bands = ((16, 8),)
    return PageFormat("full", 2, 16, k_bands=bands, v_bands=bands, rope=rope, prefill_segment=512)


@pytest.mark.parametrize("name", FAMILIES)
def test_pages_are_read_as_what_was_sealed(name):
    """Against transformers' own forward, all tokens given, behind a prompt of two blocks: by what
    part of their spread logits are off."""
    model, tokens, num_prompt_tokens = build(name), random_prompts([1240], seed=3)[0], 1220
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0, num_prompt_tokens - 1 :]
    got, llm = forced(model, tokens, num_prompt_tokens, kv_format="exact")
    assert float((got - want).abs().max()) < 1e-4 * float(want.std())
    error = {}
    for rope in ("frame", "post"):
        got, llm = forced(model, tokens, num_prompt_tokens, kv_format=full_rank(rope))
        error[rope] = float((got - want).abs().max() / want.std())
        stats, sealing = llm.stats(), sum(len(g.layers) for g in llm.cache.groups if g.seals)
        assert stats["pages_sealed"] == 2 * sealing
        assert stats["pages_attended"] > 20 * sealing or not sealing
    assert max(error.values()) < 0.25, error
    assert error["frame"] <= 2.5 * error["post"], f"turning back is not exact: {error}"
    assert (max(error.values()) > 1e-4) == (sealing > 0), "pages were read"


@pytest.mark.parametrize("name", ["cohere2", "smollm3", "phi3", "gemma2"])
def test_a_calibration_serves_layers_that_differ(name):
    """On the basis that was taken from the model: rows of another rotation would fit nothing."""
    model = build(name)
    before = model.config._attn_implementation
    tokens = random_prompts([1240], seed=4)[0]
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0, -20:]
    geometry = ModelGeometry.from_config(model.config)
    text = {"input_ids": random_prompts([1100], seed=9)[0]}
    basis = calibrate(LoadedModel(name, model, lambda _: text, geometry), ["text"])
    assert model.config._attn_implementation == before
    bands = ((16, 8),)
    format = PageFormat(
        "shared",
        2,
        16,
        k_bands=bands,
        v_bands=bands,
        basis="shared",
        rope="frame",
        dim_weighting="calibrated",
        prefill_segment=512,
    )
    got, llm = forced(model, tokens, 1221, kv_format=format, calibration=basis)
    assert llm.stats()["pages_attended"] > 0
    assert float((got - want).abs().max()) < 0.3 * float(want.std())
