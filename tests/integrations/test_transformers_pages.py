"""`SpectralPagedCache` with formats that seal makes pages, attends to them, and is near exact."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from spectral_paged import PageFormat
from spectral_paged.integrations.cached_attention import ATTENTION_NAME
from spectral_paged.integrations.padded_rows import left_padded
from support.padded_batch import LENGTHS, attending_model, batch, build, generated, paged_cache
from support.real_text import smollm2, text
from support.tiny_model import random_prompts, tiny_format

NEW = 8
# a model of each family, and how many of its two layers seal; short windows stay exact
SEALING = {
    "llama": 2,
    "mistral": 2,
    "qwen2, yarn, one kv head, window in no layer": 2,
    "qwen3": 2,
    "granite": 2,
    "gemma": 2,
    "gemma2": 1,
    "gemma3": 1,
    "cohere": 2,
    "cohere2": 1,
    "phi3": 2,
    "olmo2": 2,
    "smollm3": 2,
    "mistral, a window that is sealed": 2,
    "gemma2, a window that is sealed": 2,
}
WINDOWED = (
    "gemma3",
    "cohere",
    "cohere2",
    "mistral, a window that is sealed",
    "gemma2, a window that is sealed",
)
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


@pytest.mark.parametrize("name", SEALING)
def test_pages_are_sealed_attended_and_close(name):
    model, inputs = build(name), batch()
    tokens = torch.tensor(random_prompts([NEW] * len(LENGTHS), seed=3))
    model.set_attn_implementation(ATTENTION_NAME)
    exact = scores(model, inputs, paged_cache(model), tokens)
    cache = paged_cache(model, fine(model))
    paged = scores(model, inputs, cache, tokens)
    stats = cache.stats()
    sealing = sum(len(group.layers) for group in cache.kv_cache.groups if group.seals)
    assert sealing == SEALING[name]
    assert stats["pages_sealed"] == PAGES * sealing
    assert stats["pages_attended"] == PAGES * sealing * NEW
    assert torch.allclose(paged[:, 0], exact[:, 0], atol=1e-4)  # a prompt sees itself exactly
    assert torch.allclose(paged[0], exact[0], atol=1e-4)  # and so does a row without pages
    error = kl(exact[[1, 3], 1:], paged[[1, 3], 1:])
    assert 0 < error < 1e-3, error
    cache.kv_cache.check_integrity()


def test_a_row_says_the_same_alone_and_in_a_batch():
    model, prompts = attending_model(), random_prompts(LENGTHS)
    cache = paged_cache(model, tiny_format())
    together = generated(model, left_padded(prompts), cache, max_new_tokens=40)
    assert cache.stats()["pages_attended"] == 2 * PAGES * 39
    for row, prompt in enumerate(prompts):
        cache.reset()
        alone = generated(model, left_padded([prompt]), cache, max_new_tokens=40)
        assert torch.equal(alone[0], together[row]), row


def test_generating_seals_as_it_goes():
    """A row that grows past a block is sealed there, and a reset gives everything back."""
    model = attending_model()
    cache = paged_cache(model, tiny_format())
    generated(model, batch((630,)), cache, max_new_tokens=30)
    assert cache._rows.num_tokens()[0] == 659
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
    materialized(attending_model(), attention, fine if sealing else None)


@pytest.mark.parametrize("name", WINDOWED)
def test_materialized_windows_and_rotations_say_what_pages_say(name):
    """What left a window is gone, the rest stands in its columns; pairs as the model has them."""
    materialized(build(name), "eager", fine)


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_what_is_materialized_stands_where_a_dynamic_cache_has_it(name, monkeypatch):
    """Landmarks and tail are what the model gave; pages are close to it."""
    model, inputs = build(name), batch((700,))
    given, cache = (
        DynamicCache(config=model.config),
        paged_cache(model, fine(model), materialize=True),
    )
    new = {
        "input_ids": torch.tensor([[7]]),
        "attention_mask": torch.ones(1, 701, dtype=torch.long),
    }
    with torch.no_grad():
        for each in (given, cache):
            model(**inputs, past_key_values=each)
        model(**new, past_key_values=given)
        returned, update = {}, cache.update
        monkeypatch.setattr(
            cache,
            "update",
            lambda k, v, layer, **_: returned.setdefault(layer, update(k, v, layer)),
        )
        model(**new, past_key_values=cache)
    for side, expected in zip(returned[0], (given.layers[0].keys, given.layers[0].values)):
        assert side.shape == expected.shape
        kept = [*range(64), *range(576, 701)]
        assert torch.equal(side[:, :, kept], expected[:, :, kept])
        error = (side - expected)[:, :, 64:576].norm() / expected[:, :, 64:576].norm()
        assert 0 < error < 0.02


def materialized(model, attention, format_of):
    kv_format, inputs = "exact" if format_of is None else format_of(model), batch()
    tokens = torch.tensor(random_prompts([NEW] * len(LENGTHS), seed=3))
    model.set_attn_implementation(ATTENTION_NAME)
    attending = paged_cache(model, kv_format)
    expected = scores(model, inputs, attending, tokens)
    model.set_attn_implementation(attention)
    cache = paged_cache(model, kv_format, materialize=True)
    found = scores(model, inputs, cache, tokens)
    assert torch.allclose(found, expected, atol=5e-3)
    assert cache.stats()["pages_sealed"] == attending.stats()["pages_sealed"]
    assert (cache.stats()["pages_sealed"] > 0) == (format_of is not None)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_the_gpu_says_what_it_says_on_the_cpu():
    model, inputs = attending_model(), batch()
    here = generated(model, inputs, paged_cache(model, tiny_format()))
    model, inputs = model.cuda(), {name: x.cuda() for name, x in inputs.items()}
    cache = paged_cache(model, tiny_format())
    assert torch.equal(generated(model, inputs, cache).cpu(), here)
    assert cache.stats()["pages_attended"] == PAGES * 2 * (NEW - 1)
    cache.kv_cache.check_integrity()


@pytest.mark.model
def test_a_real_model_finds_what_lies_in_its_pages():
    """The question comes in a second forward, to which the needle is in a page."""
    loaded = smollm2()
    model, tokenizer = loaded.model, loaded.tokenizer
    passage = text("alice")[:2800]
    middle = passage.index(" ", 1200)
    passage = f"{passage[:middle]} The secret number of the white door is 7391.{passage[middle:]}"
    question = "\n\nQuestion: What is the secret number of the white door?\nAnswer: The secret "
    question += "number of the white door is"
    seen, asked = (left_padded([tokenizer(text)["input_ids"]]) for text in (passage, question))
    both = {name: torch.cat([seen[name], asked[name]], dim=1) for name in seen}
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        cache = paged_cache(model, "auto", kv_cache_bytes=64 << 20)
        with torch.no_grad():
            model(**seen, past_key_values=cache, logits_to_keep=1)
        tokens = generated(model, both, cache, max_new_tokens=5)
    finally:
        model.set_attn_implementation(before)
    assert "7391" in tokenizer.decode(tokens[0])
    assert cache.stats()["pages_attended"] == 30 * 5
    assert cache.kv_cache.format.name == "spectral-quality"
