"""`SpectralPagedCache` with formats that seal: pages are made, attended to, and close to exact."""

from __future__ import annotations

import pytest
import torch
from padded_batch import LENGTHS, attending_model, batch, generated, padded, paged_cache
from real_text import smollm2, text
from test_models import VARIANTS, build
from tiny_model import random_prompts, tiny_format

from spectral_paged import PageFormat
from spectral_paged.integrations.cached_attention import ATTENTION_NAME

NEW = 8
PAGES = 1 + 2  # of rows with 700 and 1,300 tokens, in a layer


def scores(model, inputs, cache, tokens):
    """Logits `[rows, NEW, vocab]` of a prompt and of `tokens` behind it, one a step."""
    mask, found = inputs["attention_mask"], []
    with torch.no_grad():
        out = model(**inputs, past_key_values=cache)
        for step in range(tokens.shape[1]):
            found.append(out.logits[:, -1])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = model(
                input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache
            )
    return torch.stack(found, dim=1)


def fine(model):
    """A format that loses little on random K and V: all components, in 8 bits."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bands = ((dim, 8),)
    return PageFormat("fine", config.num_key_value_heads, dim, bands, bands, rope="frame")


def kl(p, q):
    """Mean KL(p || q) in nats of two sets of logits."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_are_sealed_attended_and_close(variant):
    model, inputs = build(variant), batch()
    tokens = torch.tensor(random_prompts([NEW] * len(LENGTHS), seed=3))
    model.set_attn_implementation(ATTENTION_NAME)
    exact = scores(model, inputs, paged_cache(model), tokens)
    cache = paged_cache(model, fine(model))
    paged = scores(model, inputs, cache, tokens)
    stats = cache.stats()
    sealing = sum(len(group.layers) for group in cache.kv_cache.groups if group.seals)
    assert sealing > 0
    assert stats["pages_sealed"] == PAGES * sealing
    assert stats["pages_attended"] == PAGES * sealing * NEW
    assert torch.equal(paged[:, 0], exact[:, 0])  # a prompt sees itself exactly
    assert torch.equal(paged[0], exact[0])  # and so does a row without pages
    error = kl(exact[[1, 3], 1:], paged[[1, 3], 1:])
    assert 0 < error < 1e-3, error
    cache.kv_cache.check_integrity()


def test_a_row_says_the_same_alone_and_in_a_batch():
    model, prompts = attending_model(), random_prompts(LENGTHS)
    cache = paged_cache(model, tiny_format())
    together = generated(model, padded(prompts), cache, max_new_tokens=40)
    assert cache.stats()["pages_attended"] == 2 * PAGES * 39
    for row, prompt in enumerate(prompts):
        cache.reset()
        alone = generated(model, padded([prompt]), cache, max_new_tokens=40)
        assert torch.equal(alone[0], together[row]), row


def test_generating_seals_as_it_goes():
    """A row that grows past a block is sealed there, and a reset gives everything back."""
    model = attending_model()
    cache = paged_cache(model, tiny_format())
    generated(model, batch((630,)), cache, max_new_tokens=30)
    assert cache.kv_cache.num_tokens(cache._rows[0]) == 659
    assert cache.stats()["pages_sealed"] == 2
    assert cache.stats()["pages_attended"] == 2 * (659 - 640)  # positions 640 to 658
    cache.reset()
    assert cache.stats()["pages_in_use"] == 0
    cache.kv_cache.check_integrity()


def test_a_prompt_in_chunks_attends_to_its_sealed_beginning():
    """And takes less memory: here the whole prompt would not fit exactly."""
    model, inputs = attending_model(), batch((1300, 1290))
    small = 2 * 2 * 900 * 2 * 2 * 16 * 4  # rows, layers, tokens, K and V, heads, width, bytes
    whole = paged_cache(model, "spectral-page", kv_cache_bytes=small)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generated(model, inputs, whole)
    assert whole.batch_size == -1 and whole.stats()["kv_cache_usage"] == 0.0
    cache = paged_cache(model, "spectral-page", kv_cache_bytes=small)
    tokens = generated(model, inputs, cache, prefill_chunk_size=128)
    assert tokens.shape == (2, NEW)
    assert cache.stats()["pages_sealed"] == 2 * 2 * 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sealing", [False, True], ids=["exact", "sealed"])
def test_materialized_keys_say_what_pages_say(attention, sealing):
    model, inputs = attending_model(), batch()
    kv_format = fine(model) if sealing else "exact"
    tokens = torch.tensor(random_prompts([NEW] * len(LENGTHS), seed=3))
    expected = scores(model, inputs, paged_cache(model, kv_format), tokens)
    model.set_attn_implementation(attention)
    cache = paged_cache(model, kv_format, materialize=True)
    found = scores(model, inputs, cache, tokens)
    assert torch.allclose(found, expected, atol=1e-3)
    assert cache.stats()["pages_sealed"] == PAGES * 2 * sealing


def test_materialized_conversations_go_on():
    """Turns of different lengths leave padding between a row's tokens."""
    model = attending_model()
    inputs, turn = batch((5, 700)), batch((3, 66), seed=9)
    found = []
    for attention in (ATTENTION_NAME, "sdpa"):
        model.set_attn_implementation(attention)
        cache = paged_cache(model, "spectral-page", materialize=attention == "sdpa")
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        mask = torch.cat([inputs["attention_mask"], turn["attention_mask"]], dim=1)
        new = {"input_ids": turn["input_ids"], "attention_mask": mask}
        found.append(generated(model, new, cache))
    assert torch.equal(*found)


@pytest.mark.model
def test_a_real_model_finds_what_lies_in_its_pages():
    loaded = smollm2()
    model, tokenizer = loaded.model, loaded.tokenizer
    passage = text("alice")[:2800]
    middle = passage.index(" ", 1200)
    needle = " The secret number of the white door is 7391."
    question = "\n\nQuestion: What is the secret number of the white door?\nAnswer: The secret "
    question += "number"
    prompt = passage[:middle] + needle + passage[middle:] + question
    inputs = padded([tokenizer(prompt)["input_ids"]])
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        cache = paged_cache(model, "auto", kv_cache_bytes=256 << 20, tokenizer=tokenizer)
        tokens = generated(model, inputs, cache, max_new_tokens=8)
    finally:
        model.set_attn_implementation(before)
    answer = tokenizer.decode(tokens[0])
    assert "7391" in answer, answer
    assert cache.stats()["pages_attended"] > 0
    assert cache.kv_cache.format.name == "spectral-quality"
