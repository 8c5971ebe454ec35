"""Refusals of `SpectralPagedCache` name a remedy and leave the cache usable."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from spectral_paged import SpectralKVCache
from spectral_paged.cache import read_history
from spectral_paged.cache.sealer import SealCheck
from spectral_paged.errors import (
    CapacityError,
    FormatError,
    InvalidRequestError,
    NonFiniteError,
    PoolError,
    UnsupportedModelError,
)
from spectral_paged.integrations.cached_attention import ATTENTION_NAME
from spectral_paged.integrations.padded_rows import left_padded
from support.padded_batch import attending_model, batch, generated, paged_cache
from support.tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model


@pytest.fixture
def model():
    return attending_model()


@pytest.fixture
def cache(model):
    return paged_cache(model)


def still_serves(model, cache):
    inputs = batch((5, 70), seed=5)
    cache.reset()
    cache.kv_cache.check_integrity()
    return torch.equal(generated(model, inputs, cache), generated(model, inputs))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_when_it_is_made(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    with pytest.raises(InvalidRequestError, match=f"'{attention}'.*set_attn_implementation.*mater"):
        paged_cache(model)


def test_another_attention_when_it_is_used(model, cache):
    model.set_attn_implementation("sdpa")
    with pytest.raises(InvalidRequestError, match=r"set_attn_implementation\('spectral_paged_c"):
        generated(model, batch(), cache)
    model.set_attn_implementation(ATTENTION_NAME)
    assert still_serves(model, cache)


@pytest.mark.parametrize(
    "options", [{"assistant": True}, {"prompt_lookup_num_tokens": 3}], ids=["assistant", "lookup"]
)
def test_assisted_decoding(model, cache, options):
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_model()
    with pytest.raises(InvalidRequestError, match="assisted decoding.*DynamicCache"):
        generated(model, batch((70,)), cache, **options)
    assert still_serves(model, cache)


def test_taking_tokens_back(model, cache):
    generated(model, batch((70,)), cache)
    with pytest.raises(InvalidRequestError, match="cannot take tokens back"):
        cache.crop(-1)
    assert not cache.is_croppable


def test_copies(cache):
    with pytest.raises(InvalidRequestError, match="batch_repeat_interleave"):
        copy.deepcopy(cache)


def test_another_model(model, cache):
    """Of the same shape: a hook of its own, or none, tells."""
    other = attending_model()
    with pytest.raises(InvalidRequestError, match="made for this model|make one for this model"):
        generated(other, batch((70,)), cache)
    paged_cache(other)
    with pytest.raises(InvalidRequestError, match="made for another model"):
        generated(other, batch((70,)), cache)
    assert still_serves(model, cache)


def test_a_family_that_is_not_served():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50))
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        paged_cache(model, materialize=True)


def test_a_format_for_another_geometry(model):
    other = dataclasses.replace(tiny_format("spectral-page"), num_kv_heads=4)
    with pytest.raises(FormatError, match="4 KV heads.*the model has 2"):
        paged_cache(model, other)


def test_a_batch_of_more_rows_than_the_cache_takes(model):
    cache = paged_cache(model, max_num_seqs=3)
    with pytest.raises(InvalidRequestError, match="4 rows; this cache takes 3.*max_num_seqs=4"):
        generated(model, batch((5, 6, 7, 8)), cache)
    with pytest.raises(InvalidRequestError, match="4 rows; this cache takes 3"):
        generated(model, batch((5, 6)), cache, num_beams=2)
    assert still_serves(model, cache)


def test_more_tokens_than_fit(model):
    cache = paged_cache(model, kv_cache_bytes=1 << 20)
    lengths = [1300] * 4
    with pytest.raises(CapacityError, match="5200 more tokens in 4 rows.*kv_cache_bytes"):
        generated(model, batch(lengths), cache)
    assert cache.batch_size == -1 and cache.get_seq_length() == 0
    assert still_serves(model, cache)


def test_a_row_that_outgrows_the_pool_leaves_what_is_stored(model):
    cache = paged_cache(model, kv_cache_bytes=300_000)
    inputs = batch((250, 250))
    with pytest.raises(CapacityError, match="2 more tokens in 2 rows do not fit beside"):
        generated(model, inputs, cache, max_new_tokens=200)
    held = cache.get_seq_length()
    assert 250 < held < 450
    assert cache._rows.num_tokens() == [held, held]
    assert still_serves(model, cache)


def test_rows_that_cannot_be_repeated(model):
    cache = paged_cache(model, kv_cache_bytes=300_000)
    with torch.no_grad():
        model(**batch([70] * 3), past_key_values=cache)
    with pytest.raises(CapacityError, match="9 rows; the cache was reset"):
        cache.batch_repeat_interleave(3)
    assert cache.batch_size == -1
    assert still_serves(model, cache)


def test_a_row_longer_than_the_model(model):
    cache = paged_cache(model, max_model_len=100)
    with pytest.raises(CapacityError, match="101 tokens; max_model_len is 100"):
        generated(model, batch((101,)), cache)
    assert cache.get_max_length() == 100
    assert still_serves(model, cache)
    with pytest.raises(InvalidRequestError, match="this model takes 2 to 4096"):
        paged_cache(model, max_model_len=5000)


def test_another_prompt_without_a_reset(model, cache):
    generated(model, batch((70, 5)), cache)
    with pytest.raises(InvalidRequestError, match=r"batch has 3 rows.*call reset\(\)"):
        generated(model, batch((80, 80, 80), seed=2), cache)
    longer = batch((90, 90), seed=2)
    longer["attention_mask"][:] = 1
    # newer releases of transformers hand on no mask that hides nothing
    says = r"(row 1, the cache stored 12|padding and this one has none).*call reset\(\)"
    with pytest.raises(InvalidRequestError, match=says):
        generated(model, longer, cache)
    assert still_serves(model, cache)


def test_masks_that_do_not_go_on(model, cache):
    with torch.no_grad():
        model(**batch((70, 5)), past_key_values=cache)
        new = torch.ones(2, 3, dtype=torch.long)
        with pytest.raises(InvalidRequestError, match=r"is \[2, 3\].*takes \[2, 73\]"):
            model(input_ids=new, attention_mask=new, past_key_values=cache)
        with pytest.raises(InvalidRequestError, match="padding and this one has none"):
            model(input_ids=new, past_key_values=cache)
    assert cache.get_seq_length() == 70
    assert still_serves(model, cache)


def test_masks_that_are_ready_made(model, cache):
    ids = batch((70,))["input_ids"]
    for mask in ({"full_attention": None}, torch.zeros(1, 1, 70, 70)):
        with torch.no_grad(), pytest.raises(InvalidRequestError, match=r"takes \[1, 70\]"):
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert still_serves(model, cache)


def test_attention_weights(model, cache):
    options = {"output_attentions": True, "return_dict_in_generate": True}
    with pytest.raises(InvalidRequestError, match="output_attentions.*materialize=True"):
        model.generate(**batch((70,)), **options, max_new_tokens=2, past_key_values=cache)
    assert still_serves(model, cache)


def test_positions_that_count_padding(model, cache):
    inputs = batch((70, 5))
    with torch.no_grad(), pytest.raises(InvalidRequestError, match="position_ids of row 1"):
        model(**inputs, position_ids=torch.arange(70).expand(2, -1), past_key_values=cache)
    assert still_serves(model, cache)


@pytest.mark.parametrize("lengths", [(70, 5), (5, 70, 69), (2, 3)])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_rows_padded_on_the_right(model, lengths, options):
    cache = paged_cache(model, max_num_seqs=8)
    inputs = {name: rows.flip(1) for name, rows in batch(lengths).items()}
    with pytest.raises(InvalidRequestError, match="on the right.*padding_side='left'"):
        model.generate(**inputs, max_new_tokens=4, past_key_values=cache, **options)
    assert still_serves(model, cache)


def test_gradients(model, cache):
    with pytest.raises(InvalidRequestError, match=r"torch.no_grad\(\)"):
        model(**batch((70,)), past_key_values=cache)
    assert still_serves(model, cache)


def test_a_calibration_without_a_tokenizer(model):
    with pytest.raises(InvalidRequestError, match="pass tokenizer=.*spectral-page"):
        paged_cache(model, "auto")


def test_nan_fails_the_forward_that_seals_it(model):
    cache = paged_cache(model, tiny_format())
    projection = model.model.layers[1].self_attn.v_proj.weight
    kept = projection.detach().clone()
    with torch.no_grad():
        projection[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1"):
        generated(model, batch((700, 5)), cache)
    with torch.no_grad():
        projection.copy_(kept)
    cache.reset()
    assert generated(model, batch((700, 5)), cache).shape == (2, 8)


@pytest.mark.parametrize("name", ["settle", "stats", "reset"])
def test_nan_in_the_last_block_that_is_sealed_is_told_when_it_is_asked_for(
    name, model, monkeypatch
):
    """As on CUDA, where a forward's checks are known later: `generate` ends before."""
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: False))
    cache = paged_cache(model, tiny_format())
    projection = model.model.layers[1].self_attn.v_proj.weight
    kept = projection.detach().clone()
    with torch.no_grad():
        projection[0, 0] = float("nan")
    generated(model, batch((700, 5)), cache, max_new_tokens=1)
    with torch.no_grad():
        projection.copy_(kept)
    with pytest.raises(NonFiniteError, match="layer 1"):
        getattr(cache, name)()
    getattr(cache, name)()  # it is told once
    cache.reset()
    assert cache.stats()["num_sequences"] == 0
    assert generated(model, batch((700, 5)), cache).shape == (2, 8)


def test_nan_of_a_batch_that_failed_is_not_told_again(model, monkeypatch):
    """Row 1 has it in a block that is sealed by the very forward which tells of row 0's."""
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: False))
    cache = paged_cache(model, tiny_format())
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("inf")
    inputs = batch((1300, 1300))
    inputs["input_ids"].clamp_(min=1)
    inputs["input_ids"][[0, 1], [100, 800]] = 0
    with pytest.raises(NonFiniteError, match="block 0"):
        generated(model, inputs, cache, prefill_chunk_size=700)
    cache.reset()


def test_layers_that_pass_the_cache_by(model, cache):
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    with pytest.raises(PoolError, match="1 of 2 layers attended"):
        generated(model, batch((70,)), cache)
    assert cache.get_seq_length() == 0


def test_segments_of_a_step_elsewhere():
    """`prefill_segment=0` is for callers that cannot cut their steps, and shares no prefixes."""
    format = tiny_format(prefill_segment=0)
    with pytest.raises(FormatError, match="prefill_segment=0.*scheduler"):
        tiny_llm(format)
    geometry = {"num_layers": 1, "num_q_heads": 2, "num_kv_heads": 2, "head_dim": 16, "rope": None}
    options = {"max_model_len": 2048, "kv_cache_bytes": 1 << 20}
    exact = dataclasses.replace(format, k_bands=(), v_bands=())
    with pytest.raises(FormatError, match="enable_prefix_caching=False"):
        SpectralKVCache(**geometry, **options, format=exact)
    cache = SpectralKVCache(**geometry, **options, format=exact, enable_prefix_caching=False)
    with pytest.raises(PoolError, match="read_history outside"):
        read_history(cache, 0)


def test_representation_says_what_is_held(model, cache):
    assert repr(cache).startswith("SpectralPagedCache('exact', 0 rows of 0 columns")
    generated(model, left_padded(random_prompts((9, 5))), cache)
    assert "2 rows of 16 columns" in repr(cache)
    assert cache.stats()["num_rows"] == 2 and cache.stats()["num_columns"] == 16
    assert len(cache) == 2 and not cache.is_compileable and cache.is_initialized
