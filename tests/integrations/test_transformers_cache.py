"""`SpectralPagedCache` in transformers' `generate` gives, in `exact`, a DynamicCache's tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from spectral_paged.integrations import forward_hooks
from spectral_paged.integrations.cached_attention import ATTENTION_NAME
from spectral_paged.integrations.padded_rows import left_padded
from spectral_paged.models.geometry import FAMILIES
from support.padded_batch import BUILDERS, attending_model, batch, build, generated, paged_cache
from support.tiny_model import raise_once, random_prompts


@pytest.mark.parametrize("name", BUILDERS)
def test_exact_generates_what_a_dynamic_cache_does(name):
    """Left-padded rows of 5 to 1,300 tokens, token for token."""
    model, inputs = build(name), batch()
    expected = generated(model, inputs)
    model.set_attn_implementation(ATTENTION_NAME)
    cache = paged_cache(model)
    assert torch.equal(generated(model, inputs, cache), expected)
    stored = cache._rows.num_tokens()
    assert stored == [5 + 7, 700 + 7, 64 + 7, 1300 + 7]  # tokens, and no padding
    cache.kv_cache.check_integrity()


def test_every_family_that_is_served_is_tested():
    assert {build(name).config.model_type for name in BUILDERS} == set(FAMILIES)


def test_sampling_draws_the_same_tokens():
    """With rows that `num_return_sequences` repeats."""
    model, inputs = attending_model(), batch((5, 130))
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "num_return_sequences": 3}
    found = []
    for cache in (None, paged_cache(model)):
        torch.manual_seed(7)
        found.append(generated(model, inputs, cache, **options))
    assert torch.equal(*found)
    assert len(found[0].unique(dim=0)) > 2  # the draws do differ from each other


def test_beams_share_pages_and_end_as_with_a_dynamic_cache():
    model, inputs = attending_model(), batch((5, 700))
    options = {"num_beams": 3, "max_new_tokens": 12, "num_return_sequences": 2}
    cache = paged_cache(model)
    assert torch.equal(
        generated(model, inputs, cache, **options), generated(model, inputs, **options)
    )
    pool = cache.kv_cache.groups[0].arena.slots
    alone = 3 * -(-711 // 64) + 3  # exact pages of three beams that share nothing
    assert sum(pool.num_in_use.values()) < alone
    cache.kv_cache.check_integrity()
    cache.reset()
    cache.kv_cache.check_integrity()
    assert sum(pool.num_in_use.values()) == 0


def test_tokens_are_streamed_as_they_come():
    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(f"{i} " for i in ids)

    class Streamer(TextStreamer):
        pieces = []

        def on_finalized_text(self, text, stream_end=False):
            self.pieces.append(text)

    model, inputs = attending_model(), batch((70,))
    streamer = Streamer(Tokenizer(), skip_prompt=True)
    tokens = generated(model, inputs, paged_cache(model), streamer=streamer)
    assert [int(t) for t in "".join(streamer.pieces).split()] == tokens[0].tolist()
    assert len(streamer.pieces) > 4


def test_a_reset_cache_and_a_fresh_one_serve_the_next_prompt_alike():
    model, cache = attending_model(), None
    cache = paged_cache(model)
    for seed, lengths in enumerate([(700, 5), (64, 3, 650), (1,)]):
        inputs = batch(lengths, seed)
        assert torch.equal(generated(model, inputs, cache), generated(model, inputs)), lengths
        cache.reset()
        cache.kv_cache.check_integrity()


@pytest.mark.parametrize("only_new", [False, True], ids=["all tokens", "new tokens alone"])
def test_a_conversation_goes_on_with_the_same_cache(only_new):
    """A second turn, padded where the rows' turns differ; both ways that generate knows."""
    model = attending_model()
    inputs, turn = batch((5, 700)), batch((3, 66), seed=9)
    caches = DynamicCache(config=model.config), paged_cache(model)
    found = []
    for cache in caches:
        first = generated(model, inputs, cache)
        ids = torch.cat([inputs["input_ids"], first, turn["input_ids"]], dim=1)
        mask = [inputs["attention_mask"], torch.ones_like(first), turn["attention_mask"]]
        mask = torch.cat(mask, dim=1)
        # what was not stored yet is the last sampled token
        given = ids[:, cache.get_seq_length() :] if only_new else ids
        new = {"input_ids": given, "attention_mask": mask}
        found.append(generated(model, new, cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral, a window"])
def test_a_prompt_may_come_in_chunks(name):
    model, inputs = build(name), batch((300, 5))
    whole = generated(model, inputs)
    model.set_attn_implementation(ATTENTION_NAME)
    cut = generated(model, inputs, paged_cache(model), prefill_chunk_size=128)
    assert torch.equal(cut, whole)


def test_rows_are_repeated_and_selected():
    model, prompts = attending_model(), random_prompts((70, 200))
    cache = paged_cache(model)
    with torch.no_grad():
        model(**left_padded(prompts), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 3]))
    cache.kv_cache.check_integrity()
    turns = random_prompts((9, 9, 9), seed=4)
    rows = [prompts[1], prompts[0], prompts[1]]
    asked = left_padded([row + turn for row, turn in zip(rows, turns)])
    new = {"input_ids": torch.tensor(turns), "attention_mask": asked["attention_mask"]}
    got = generated(model, new, cache)
    assert torch.equal(got, generated(model, asked))
    assert len({tuple(row) for row in got.tolist()}) == 3


def test_prompts_may_be_embeddings():
    model, inputs = attending_model(), batch((5, 70))
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = {"attention_mask": inputs["attention_mask"]}
    options = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(
        inputs_embeds=embedded, **mask, **options, past_key_values=paged_cache(model)
    )
    assert torch.equal(got, model.generate(inputs_embeds=embedded, **mask, **options))


def test_an_adapter_around_a_model_is_looked_through():
    class Adapter(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def get_base_model(self):
            return self.inner

        def generate(self, **inputs):
            return self.inner.generate(**inputs)

    model, inputs = attending_model(), batch((5, 70))
    adapted = Adapter(model)
    assert torch.equal(generated(adapted, inputs, paged_cache(adapted)), generated(model, inputs))


def test_without_a_mask_every_column_is_a_token():
    model = attending_model()
    inputs = {"input_ids": torch.tensor(random_prompts((90, 90)))}
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    cache = paged_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 90 and cache.batch_size == 2
    cache.reset()
    assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)


def test_a_decoder_takes_its_inputs_by_place_too():
    model = attending_model()
    ids = batch((70,))["input_ids"]
    cache = paged_cache(model)
    with torch.no_grad():
        by_name = model.model(input_ids=ids, past_key_values=paged_cache(model))[0]
        assert torch.equal(model.model(ids, None, None, cache)[0], by_name)
    assert cache.get_seq_length() == 70


class Watching:
    """A cache that notes the calls which it gets."""

    def __init__(self):
        self.calls = []

    def begin_generate(self, input_ids, attention_mask):
        self.calls.append("generate")

    def begin_forward(self, decoder, inputs):
        self.calls.append("begin")
        return inputs

    def end_forward(self, *, failed):
        self.calls.append("end")


@pytest.mark.parametrize("name", forward_hooks.CACHE_NAMES)
def test_a_cache_is_found_by_each_name_that_transformers_gives_it(name):
    class Decoder(torch.nn.Module):
        def forward(self, input_ids, **options):
            return input_ids

        def generate(self, input_ids, **options):
            return self(input_ids, **options)

    decoder, cache = Decoder(), Watching()
    forward_hooks.watch(decoder)
    forward_hooks.watch_generate(decoder)
    decoder.generate(torch.zeros(1, 3), **{name: cache})
    assert cache.calls == ["generate", "begin", "end"]


def test_no_layer_is_linear_so_that_generate_cuts_off_what_is_stored():
    cache = paged_cache(attending_model())
    assert cache.is_linear == [False] * cache.kv_cache.num_layers


@pytest.mark.parametrize("name", ["gemma3", "mistral, a window"])
def test_windows_count_tokens_and_no_pads_between_turns(name):
    """A row says what it says alone; a DynamicCache's windows count columns."""
    model, inputs, turn = build(name), batch((130, 90)), batch((40, 10), seed=9)
    pairs = zip(inputs.values(), turn.values())
    ids, mask = (torch.cat(pair, dim=1) for pair in pairs)
    with torch.no_grad():
        alone = model(input_ids=ids[1:, mask[1].bool()], use_cache=False).logits[0, -10:]
        model.set_attn_implementation(ATTENTION_NAME)
        cache = paged_cache(model)
        model(**inputs, past_key_values=cache)
        new = {"input_ids": turn["input_ids"], "attention_mask": mask}
        got = model(**new, past_key_values=cache).logits
    assert torch.allclose(got[1, -10:], alone, atol=1e-4)


def test_a_plain_forward_counts_positions_from_the_first_token():
    model, inputs = attending_model(), batch((5, 40))
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions).logits
        got = model(**inputs, past_key_values=paged_cache(model)).logits
    shown = inputs["attention_mask"].bool()
    assert torch.allclose(got[shown], expected[shown], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_model_stays_what_it_was(name):
    """Stock generate, and training, under our attention and after a cache was used."""
    model, inputs = build(name), batch((5, 130))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def trained():
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.item(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    tokens, (loss, gradient) = generated(model, inputs), trained()
    unpadded = batch((130,))
    alone = generated(model, unpadded)
    model.set_attn_implementation(ATTENTION_NAME)
    generated(model, inputs, paged_cache(model))
    assert torch.equal(generated(model, inputs), tokens)
    assert torch.equal(generated(model, unpadded), alone)
    again, same = trained()
    assert again == pytest.approx(loss, rel=1e-5) and gradient.abs().max() > 0
    assert torch.allclose(same, gradient, atol=1e-6)


def test_a_forward_that_fails_leaves_the_cache_where_it_was(monkeypatch):
    model, inputs = attending_model(), batch((5, 130))
    expected = generated(model, inputs)
    cache = paged_cache(model)
    second = model.model.layers[1].mlp
    with monkeypatch.context() as patch:
        raise_once(patch, type(second), "forward", RuntimeError("out of memory"), call=2)
        with pytest.raises(RuntimeError, match="out of memory"):
            generated(model, inputs, cache)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    cache.kv_cache.check_integrity()
    with monkeypatch.context() as patch:  # now in the fifth decode step
        raise_once(patch, type(second), "forward", RuntimeError("out of memory"), call=12)
        with pytest.raises(RuntimeError, match="out of memory"):
            generated(model, inputs, cache)
    assert cache.get_seq_length() == 130 + 4
    cache.kv_cache.check_integrity()
    ids = torch.cat([inputs["input_ids"], expected[:, :5]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    rest = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(generated(model, rest, cache, max_new_tokens=3), expected[:, 5:])


@pytest.mark.parametrize("call", [1, 4], ids=["first", "fourth"])
def test_a_step_that_cannot_begin_holds_nothing(monkeypatch, call):
    model, inputs = attending_model(), batch((5, 128))
    cache = paged_cache(model)
    with monkeypatch.context() as patch:
        raise_once(patch, type(cache.kv_cache), "begin_step", MemoryError(), call=call)
        with pytest.raises(MemoryError):
            generated(model, inputs, cache)
    stored = cache._rows.num_tokens()
    assert stored == ([] if call == 1 else [5 + 2, 128 + 2])
    pages = sum(cache.kv_cache.groups[0].arena.slots.num_in_use.values())
    assert pages == (0 if call == 1 else 1 + 3)
    cache.kv_cache.check_integrity()
    cache.reset()
    assert torch.equal(generated(model, inputs, cache), generated(model, inputs))


def test_an_interrupt_inside_a_forward_is_forgotten(monkeypatch):
    model, inputs = attending_model(), batch((5, 130))
    cache = paged_cache(model)
    mlp = type(model.model.layers[1].mlp)
    with monkeypatch.context() as patch:
        raise_once(patch, mlp, "forward", KeyboardInterrupt(), call=2)
        with pytest.raises(KeyboardInterrupt):
            generated(model, inputs, cache)
    assert torch.equal(generated(model, inputs, cache), generated(model, inputs))
    cache.kv_cache.check_integrity()
