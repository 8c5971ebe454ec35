"""Patching and unpatching Unsloth's models: side by side, options, refusals, training.

`test_unsloth.py` runs this file in a new process, as it runs `unsloth_cases.py`.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from spectral_paged import PageFormat, SpectralKVCache
from spectral_paged.cache.sealer import SealCheck, Sealer
from spectral_paged.errors import (
    CapacityError,
    FormatError,
    InvalidRequestError,
    NonFiniteError,
    PatchError,
    UnsupportedModelError,
)
from spectral_paged.integrations.patching import Patch
from spectral_paged.integrations.unsloth import (
    attention as unsloth_attention,
    families as unsloth_families,
    patch as unsloth,
    patch_unsloth_attention,
    unpatch_unsloth_attention,
)
from spectral_paged.integrations.unsloth.families import FAMILIES, fast_modules
from spectral_paged.integrations.unsloth.patch import PATCH
from spectral_paged.models.loader import LoadedModel
from spectral_paged.pool.block_table import BlockTable
from support import unsloth_on_cpu
from support.tiny_model import raise_once
from support.unsloth_checkpoints import GREEDY, RANKS, adapters, batch, generate
from support.unsloth_on_cpu import functions_now, model_of

pytest_plugins = ["support.unsloth_on_cpu"]
OWN = PageFormat.preset("spectral-page", num_kv_heads=2, head_dim=16)


def test_two_models_are_patched_side_by_side_any_number_of_times(patched):
    one, two, inputs = model_of("llama"), model_of("qwen3"), batch([30, 700])
    expected = generate(one, inputs), generate(two, inputs)
    for _ in range(2):
        first = patched(one, kv_format="exact")
        assert torch.equal(generate(two, inputs), expected[1])  # not patched
        second = patched(two, **RANKS)
        assert torch.equal(generate(one, inputs), expected[0])
        generate(two, inputs)
        assert first.stats()["pages_attended"] == 0 < second.stats()["pages_attended"]
        unpatch_unsloth_attention(one)
        assert torch.equal(generate(one, inputs), expected[0])
        generate(two, inputs)
        unpatch_unsloth_attention(two)
        assert torch.equal(generate(two, inputs), expected[1])


def test_a_model_loaded_while_another_is_patched_is_not_patched(patched):
    inputs = batch([30, 700])
    expected = generate(model_of("llama"), inputs)
    patched(model_of("qwen2"), kv_format="exact")
    later = unsloth_on_cpu.load(model_of("llama").config._name_or_path)
    assert torch.equal(generate(later, inputs), expected)
    patched(later, kv_format="exact")
    assert torch.equal(generate(later, inputs), expected)


def test_a_patched_model_that_nobody_holds_is_freed():
    model = unsloth_on_cpu.load(model_of("llama").config._name_or_path)
    before = functions_now()
    patch = patch_unsloth_attention(model, kv_cache_bytes=8 << 20, verbose=False)
    assert functions_now() != before
    generate(model, batch([30, 200]))
    gone = weakref.ref(model), weakref.ref(patch.cache)
    del model, patch
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
    assert functions_now() == before


@pytest.mark.parametrize("is_undone", [True, False])
def test_a_model_is_served_that_is_patched_while_another_one_is_freed(
    is_undone, patched, monkeypatch
):
    """Garbage collection runs when it will; the other model's patch goes with that model."""
    model, inputs, make = model_of("llama"), batch([30, 700]), unsloth.model_cache
    expected = generate(model, inputs)
    other = unsloth_on_cpu.load(model.config._name_or_path)
    patch_unsloth_attention(other, kv_cache_bytes=8 << 20, verbose=False)
    held = [vars(other)[PATCH]]
    gone = weakref.ref(held[0])
    if is_undone:
        held[0].undo()

    def collecting(*args, **kwargs):
        held.clear()
        gc.collect()
        assert gone() is None
        return make(*args, **kwargs)

    del other
    monkeypatch.setattr(unsloth, "model_cache", collecting)
    patch = patched(model, kv_format="exact")
    assert torch.equal(generate(model, inputs), expected)
    assert patch.stats()["decode_steps"] == 5


def test_a_patched_model_refuses_a_second_patch_and_an_unpatched_one_to_be_unpatched(patched):
    model = model_of("llama")
    with pytest.raises(PatchError, match="not patched"):
        unpatch_unsloth_attention(model)
    patched(model)
    with pytest.raises(PatchError, match="patched already"):
        patched(model)


def test_what_cannot_be_served_is_refused_and_says_what_to_do(patched):
    model, inputs = model_of("llama"), batch([30, 200])
    patch = patched(model, kv_format="exact")
    with pytest.raises(InvalidRequestError, match="output_hidden_states"):
        generate(model, inputs, output_hidden_states=True, return_dict_in_generate=True)
    with pytest.raises(InvalidRequestError, match="without an assistant"):
        generate(model, batch([200]), prompt_lookup_num_tokens=3)
    right = {name: x.flip(1) for name, x in inputs.items()}
    with pytest.raises(InvalidRequestError, match="padding_side = 'left'"):
        generate(model, right)
    with pytest.raises(InvalidRequestError, match="no_grad"):
        model(**inputs, use_cache=True)
    with torch.no_grad(), pytest.raises(InvalidRequestError, match="position_ids"):
        positions = torch.arange(200).expand(2, -1)
        model(**inputs, position_ids=positions, use_cache=True)
    with pytest.raises(CapacityError, match="max_num_seqs"):
        generate(model, batch([10] * 9))
    assert patch.stats()["exact_pages_in_use"] == 0


def test_a_batch_that_outgrows_the_pool_says_so_and_leaves_it_whole(patched):
    model = model_of("llama")
    patch = patched(model, kv_format="exact", kv_cache_bytes=1 << 20)
    with pytest.raises(CapacityError, match="kv_cache_bytes"):
        generate(model, batch([1000, 1100]))
    assert patch.stats()["exact_pages_in_use"] == 0
    patch.cache.check_integrity()
    expected = generate(model, batch([100, 300]))
    unpatch_unsloth_attention(model)
    assert torch.equal(generate(model, batch([100, 300])), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 256}, "512"),
        ({"use_spectral_attention": False}, "kv_format='exact'"),
        ({"use_attention_weighted_svd": True}, "calibrated"),
        ({"kv_format": "exact", "k_rank_keys": 16}, "leave k_rank_keys"),
        ({"landmark_count": 100}, "128"),
        ({"hot_buffer_size": 70}, "128"),
        ({"k_rank_keys": 24}, "multiples of 16"),
        ({"k_rank_keys": 32}, "head_dim is 16"),
        ({"kv_format": "nonsense"}, "nonsense"),
        ({"prefill_segment": 0}, "prefill_segment=0.*multiple of 512"),
        ({"kv_format": OWN, "prefill_segment": 1024}, "segments of 2048 of its own"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, match, patched):
    with pytest.raises(FormatError, match=match):
        patched(model_of("llama"), **options)


@pytest.mark.parametrize("dim, name", [(64, "spectral-page"), (128, "spectral-int8")])
def test_the_default_is_calibrated_where_it_can_be(dim, name):
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    attention = SimpleNamespace(o_proj=SimpleNamespace(weight=weight))
    model = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(self_attn=attention)]))
    geometry = SimpleNamespace(num_kv_heads=2, head_dim=dim)
    loaded = LoadedModel("unsloth", model, object(), geometry)
    assert unsloth._default_format(loaded) == "spectral-quality"
    assert unsloth._default_format(replace(loaded, tokenizer=None)) == name
    attention.o_proj.weight = torch.zeros(8, 1, dtype=torch.uint8)  # as 4-bit layers hold it
    assert unsloth._default_format(loaded) == name
    options = {"prefill_segment": 2048, "hot_tokens": 64, "landmarks": None}
    assert unsloth._format(geometry, None, None, 16, **options).v_bands == ((16, 8),)


def test_options_are_fields_of_the_format(patched):
    patch = patched(
        model_of("llama"),
        k_rank_keys=16,
        k_rank_values=16,
        landmark_count=128,
        hot_buffer_size=192,
        prefill_segment=1024,
        exempt_layers=[0],
    )
    format = patch.cache.format
    assert (format.k_bands, format.v_bands) == (((16, 8),), ((16, 8),))
    assert (format.num_landmark_tokens, format.hot_tokens) == (128, 192)
    assert format.prefill_segment == 1024
    assert [group.seals for group in patch.cache.groups] == [True, False]
    patch.undo()
    own = PageFormat("own", 2, 16, ((16, 4),), ((16, 4),), rope="frame")
    assert patched(model_of("llama"), kv_format=own).cache.format is own


def test_other_versions_families_and_models_are_refused_by_name(patched, monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr("unsloth.__version__", "2025.1.1")
    with pytest.raises(UnsupportedModelError, match=f"2025.1.1.*{unsloth_families.NEWEST}"):
        patched(model)
    monkeypatch.undo()
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        patched(model.model.layers[0])
    monkeypatch.setattr(model.config, "model_type", "falcon")
    with pytest.raises(UnsupportedModelError, match=f"falcon.*{', '.join(FAMILIES)}"):
        patched(model)
    monkeypatch.undo()
    attention = model.model.layers[0].self_attn
    monkeypatch.setattr(attention, "_unsloth_fast_path", False)
    with pytest.raises(UnsupportedModelError, match="FastLanguageModel.from_pretrained"):
        patched(model)


def test_adapters_may_come_after_the_patch(patched):
    folder = model_of("llama").config._name_or_path
    inputs, plain = batch([30, 700]), unsloth_on_cpu.load(folder)
    before = generate(plain, inputs)
    expected = generate(adapters(unsloth_on_cpu.load(folder)), inputs)
    assert not torch.equal(expected, before)
    patch = patched(plain, kv_format="exact")
    model = adapters(plain)
    assert torch.equal(generate(model, inputs), expected)
    assert patch.stats()["decode_steps"] == 5
    unpatch_unsloth_attention(model)
    assert torch.equal(generate(model, inputs), expected)


def test_training_and_adapters_are_left_alone(patched):
    folder = model_of("llama").config._name_or_path
    model = adapters(unsloth_on_cpu.load(folder))
    inputs = batch([20, 24], seed=2)

    def step():
        model.for_training()
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.for_inference()
        return float(loss.detach()), grads

    loss, grads = step()
    assert len(grads) == 2 * 7 * 2 and all(bool(grad.any()) for grad in grads.values())
    tokens = generate(model, batch([30, 700]))
    patch = patched(model, kv_format="exact")
    again, same = step()
    assert again == loss and all(torch.equal(same[name], grads[name]) for name in grads)
    assert patch.stats()["prompt_steps"] == 0
    assert torch.equal(generate(model, batch([30, 700])), tokens)
    assert patch.stats()["decode_steps"] == 5
    patch.undo()
    again, same = step()
    assert again == loss and all(torch.equal(same[name], grads[name]) for name in grads)


def test_a_patch_that_is_undone_frees_its_pool_at_once(patched):
    """Without a run of the garbage collector, and although the batch's rows are still held."""
    model = unsloth_on_cpu.load(model_of("llama").config._name_or_path)
    gc.collect()
    gc.disable()
    try:
        patch = patch_unsloth_attention(model, kv_cache_bytes=8 << 20, verbose=False)
        out = generate_held(model, batch([30, 700]))
        arenas = [weakref.ref(group.arena.planes) for group in patch.cache.groups]
        assert out.past_key_values is not None and arenas[0]() is not None
        patch.undo()
        assert not any(arena() for arena in arenas)
        undone = weakref.ref(patch)
        del out, patch
        assert undone() is None
    finally:
        gc.enable()


def generate_held(model, inputs):
    """What generate returns, rows of the cache with it."""
    return model.generate(**inputs, **GREEDY, max_new_tokens=3, return_dict_in_generate=True)


def test_a_step_that_cannot_begin_leaves_the_next_one_room(patched, monkeypatch):
    model, inputs = model_of("llama"), batch([30, 700])
    expected = generate(model, inputs)
    patch = patched(model, kv_format="exact")
    for call in (1, 4):  # of the prompt's step, and of one token's
        with monkeypatch.context() as context:
            raise_once(context, BlockTable, "commit", MemoryError(), call=call)
            with pytest.raises(MemoryError):
                generate(model, inputs)
        gc.collect()  # the error holds its frames, and those of generate what may be gone on with
        assert patch.stats()["exact_pages_in_use"] == 0
        patch.cache.check_integrity()
        assert torch.equal(generate(model, inputs), expected)


@torch.no_grad()
def test_rows_are_not_gone_on_with_after_a_step_that_did_not_end(patched, monkeypatch):
    """Its tokens are stored, but the caller did not hear of it."""
    model, inputs = model_of("llama"), batch([30, 700])
    patched(model, kv_format="exact")
    past = model(**inputs, use_cache=True).past_key_values
    token = {"input_ids": inputs["input_ids"][:, :1], "use_cache": True}
    with monkeypatch.context() as context:
        raise_once(context, Sealer, "seal_due", MemoryError(), call=1)
        with pytest.raises(MemoryError):
            model(**token, past_key_values=past)
    with pytest.raises(InvalidRequestError, match="half way"):
        model(**token, past_key_values=past)


@pytest.mark.parametrize(
    "owner, name", [(SpectralKVCache, "reserve"), (Sealer, "seal_due")], ids=["reserve", "seal"]
)
@torch.no_grad()
def test_a_prompt_that_fails_gives_its_pages_back_while_its_error_is_held(
    owner, name, patched, monkeypatch
):
    """As a notebook holds the last one: the next, smaller batch would not fit beside them."""
    model, inputs = model_of("llama"), batch([30, 1300])
    patch = patched(model, **RANKS)
    with monkeypatch.context() as context:
        raise_once(context, owner, name, MemoryError(), call=2)
        with pytest.raises(MemoryError) as held:
            model(**inputs, use_cache=True)
    assert patch.stats()["num_sequences"] == 0
    patch.cache.check_integrity()
    past = model(**inputs, use_cache=True).past_key_values
    with monkeypatch.context() as context:
        raise_once(context, owner, name, MemoryError(), call=1)
        with pytest.raises(MemoryError) as later:
            both = {name: torch.cat([x, x.clone().fill_(1)], 1) for name, x in inputs.items()}
            model(**both | {"input_ids": inputs["input_ids"]}, past_key_values=past)
    assert patch.stats()["num_sequences"] == 0 and (held, later) and not past.rows.is_whole
    patch.cache.check_integrity()


def test_functions_that_somebody_replaced_since_are_given_back_later(patched):
    model, before = model_of("llama"), functions_now()
    patch = patched(model)
    module = fast_modules()[0]
    ours, module.run_attention = module.run_attention, print
    with pytest.raises(PatchError, match="undo the later patch first"):
        patch.undo()
    module.run_attention = ours
    patch.undo()
    assert functions_now() == before
    patched(model).undo()
    assert functions_now() == before


@pytest.mark.parametrize(
    ("owner", "name"), [(unsloth_attention, "replace_everywhere"), (Patch, "undo")]
)
@pytest.mark.parametrize("call", [1, 2])
def test_a_patch_that_fails_half_way_leaves_other_models_served(
    owner, name, call, patched, monkeypatch
):
    one, two, inputs = model_of("llama"), model_of("qwen3"), batch([30, 700])
    plain, untouched = generate(two, inputs), functions_now()
    first = patched(one, **RANKS)
    expected, before = generate(one, inputs), functions_now()
    with monkeypatch.context() as context:
        raise_once(context, owner, name, MemoryError(), call=call)
        with pytest.raises(MemoryError):
            patched(two)
    assert functions_now() == before and PATCH not in vars(two)
    assert torch.equal(generate(two, inputs), plain)
    steps = first.stats()["decode_steps"]
    assert torch.equal(generate(one, inputs), expected)
    assert first.stats()["decode_steps"] == steps + 5
    patched(two, **RANKS)
    unpatch_unsloth_attention(one)
    unpatch_unsloth_attention(two)
    assert functions_now() == untouched


def test_a_first_patch_that_fails_half_way_leaves_nothing_patched(patched, monkeypatch):
    model, before = model_of("llama"), functions_now()
    raise_once(monkeypatch, unsloth_attention, "replace_everywhere", MemoryError(), call=2)
    with pytest.raises(MemoryError):
        patched(model)
    assert functions_now() == before and PATCH not in vars(model)


@contextmanager
def spoiled(model):
    """NaN in what the last layer stores."""
    weight = model.model.layers[-1].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
        yield
        weight.copy_(kept)


@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize("name", ["settle", "stats", "undo"])
@torch.no_grad()
def test_nan_in_the_last_block_that_is_sealed_is_told_when_it_is_asked_for(
    name, is_held, patched, monkeypatch
):
    """As on CUDA, where a step's checks are known later."""
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: False))
    model, before = model_of("llama"), functions_now()
    patch = patched(model, **RANKS)
    with spoiled(model):
        out = model(**batch([700]), use_cache=True)  # its last step seals
    if not is_held:
        del out
    with pytest.raises(NonFiniteError, match="layer 1"):
        getattr(patch, name)()
    getattr(patch, "settle" if name == "undo" else name)()  # it is told once
    patch.undo()
    assert functions_now() == before and PATCH not in vars(model)


@torch.no_grad()
def test_nan_that_is_found_late_fails_no_other_batch(patched, monkeypatch):
    monkeypatch.setattr(SealCheck, "is_known", property(lambda self: False))
    model, inputs = model_of("llama"), batch([30, 700])
    patch = patched(model, **RANKS)
    expected = generate(model, inputs)
    with spoiled(model):
        past = model(**batch([700]), use_cache=True).past_key_values
    assert torch.equal(generate(model, inputs), expected)
    token = {"input_ids": inputs["input_ids"][:1, -1:], "past_key_values": past}
    with pytest.raises(NonFiniteError, match="layer 1"):
        model(**token, use_cache=True)
    with pytest.raises(InvalidRequestError, match="half way"):
        model(**token, use_cache=True)
    assert patch.stats()["num_sequences"] == 0
