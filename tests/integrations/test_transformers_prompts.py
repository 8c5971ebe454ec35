"""A prompt in a cache that is not empty goes on from it, begins a new batch, or is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, pipeline

from spectral_paged.errors import InvalidRequestError
from support.padded_batch import attending_model, batch, generated, paged_cache
from support.served import letter_tokenizer

TEXTS = ["hello there", "hi", "a text longer than the ones before it together", "hello", "x"]


@pytest.fixture
def model():
    return attending_model()


def pipe(model):
    tokenizer = letter_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "~", "left"
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def texts(found):
    return [
        one["generated_text"] for row in found for one in (row if isinstance(row, list) else [row])
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_pipeline_serves_every_batch_with_a_cache_that_resets_itself(model, batch_size):
    made, options = pipe(model), {"max_new_tokens": 5, "do_sample": False}
    want = texts(made(TEXTS, batch_size=batch_size, **options))
    cache = paged_cache(model, auto_reset=True)
    got = made(TEXTS, batch_size=batch_size, past_key_values=cache, **options)
    assert texts(got) == want and len(set(want)) == len(TEXTS)
    cache.kv_cache.check_integrity()


def test_a_pipelines_second_batch_is_refused_with_the_remedy(model):
    cache = paged_cache(model)
    with pytest.raises(InvalidRequestError, match="auto_reset=True, for a pipeline"):
        pipe(model)(TEXTS, past_key_values=cache, max_new_tokens=5)


def test_a_longer_prompt_never_goes_on_from_another_ones_tokens(model):
    """`generate` cuts off the columns that are stored, whatever is in them."""
    cache = paged_cache(model)
    generated(model, batch((7,)), cache)
    other = batch((90,), seed=2)
    with pytest.raises(InvalidRequestError, match=r"does not begin with the tokens of the 14 col"):
        generated(model, other, cache)
    cache.reset()
    assert torch.equal(generated(model, other, cache), generated(model, other))


@pytest.mark.parametrize("lengths", [(90,), (90, 90), (3, 200), (5,)])
def test_a_cache_that_resets_itself_serves_any_prompt(model, lengths):
    cache = paged_cache(model, auto_reset=True)
    generated(model, batch((70, 5)), cache)
    other = batch(lengths, seed=2)
    assert torch.equal(generated(model, other, cache), generated(model, other))


def test_a_conversation_goes_on_in_a_cache_that_resets_itself(model):
    inputs, found = batch((5, 70)), []
    for cache in (DynamicCache(config=model.config), paged_cache(model, auto_reset=True)):
        first = generated(model, inputs, cache)
        ids = torch.cat([inputs["input_ids"], first, first.flip(1)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, 70:])], dim=1)
        before = cache.get_seq_length()
        found.append(generated(model, {"input_ids": ids, "attention_mask": mask}, cache))
        assert cache.get_seq_length() > before + first.shape[1], "nothing was forgotten"
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3}], ids=str)
def test_rows_that_were_copied_are_compared_one_by_one(model, options):
    """Beams end with other tokens than the best one, so the prompt goes on from none of them."""
    cache, inputs = paged_cache(model, auto_reset=True), batch((70,))
    options |= {"do_sample": "num_beams" not in options}
    torch.manual_seed(1)
    rows = generated(model, inputs, cache, **options)
    ids = torch.cat([inputs["input_ids"], rows[:1], rows[:1]], dim=1)
    new = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generated(model, new, cache), generated(model, new))


def test_after_embeddings_nobody_can_tell_and_the_mask_decides(model):
    cache, inputs = paged_cache(model), batch((70,))
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = {"attention_mask": inputs["attention_mask"]}
    options = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache}
    new = model.generate(inputs_embeds=embedded, **mask, **options)
    ids = torch.cat([inputs["input_ids"], new, new], dim=1)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generated(model, asked, cache), generated(model, asked))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_generates_by_itself(model, copied):
    cache, inputs = paged_cache(model), batch((70,))
    want = generated(model, inputs, cache)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(generated(other, inputs), want)
    assert torch.equal(generated(other, inputs, paged_cache(other)), want)
