"""Unsloth's own prefill and decode paths over the cache; `test_unsloth.py` runs this in a process
of its own, because importing Unsloth changes transformers for good."""

from __future__ import annotations

import functools
import gc
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
import unsloth_on_cpu  # before transformers
from unsloth_checkpoints import (
    GREEDY,
    LENGTHS,
    adapters,
    batch,
    checkpoint,
    decode_logits,
    distance,
    generate,
)

from spectral_paged import PageFormat
from spectral_paged.benchmarks.unsloth import measure
from spectral_paged.errors import (
    CapacityError,
    FormatError,
    InvalidRequestError,
    PatchError,
    UnsupportedModelError,
)
from spectral_paged.integrations import unsloth_families, unsloth_graphs, unsloth_prompt
from spectral_paged.integrations.unsloth import (
    patch_unsloth_attention,
    unpatch_unsloth_attention,
)
from spectral_paged.integrations.unsloth_families import FAMILIES, fast_functions, fast_modules

SERVED = list(FAMILIES)
CHECKPOINTS = tempfile.TemporaryDirectory(prefix="unsloth-")
RANKS = {"k_rank_keys": 16, "k_rank_values": 16, "prefill_segment": 512}


@functools.cache
def model_of(family, **changes):
    folder = Path(CHECKPOINTS.name) / family
    return unsloth_on_cpu.load(checkpoint(folder, family, **changes))


@pytest.fixture
def patched():
    """Patch a model with a small poisoned pool; whatever a test leaves patched is undone."""
    models = []

    def patch(model, **options):
        defaults = {"kv_cache_bytes": 32 << 20, "max_num_seqs": 8, "verbose": False, "poison": True}
        models.append(patch_unsloth_attention(model, **(defaults | options)))
        return models[-1]

    yield patch
    for model in models:
        model.undo()


@torch.no_grad()
def prompt_logits(model, inputs):
    """Logits of all tokens that are no pads, fp32 `[T, vocab]`."""
    return model(**inputs, use_cache=True).logits[inputs["attention_mask"].bool()]


def functions_now():
    """What every reference to a function that is replaced holds, by name."""
    return {
        f"{module.__name__}.{name}": vars(module).get(name)
        for module in fast_modules()
        for name in fast_functions()
    }


@pytest.mark.parametrize("family", SERVED)
def test_exact_generates_what_the_unpatched_model_does_and_unpatching_gives_it_back(
    family, patched
):
    model, inputs = model_of(family), batch()
    tokens = generate(model, inputs)
    logits, steps = prompt_logits(model, inputs), decode_logits(model, inputs)
    before, forward = functions_now(), vars(model).get("forward")
    held = [hasattr(layer.self_attn, "paged_attention") for layer in model.model.layers]
    assert all(held) == FAMILIES[family].is_fast
    patch = patched(model, kv_format="exact")
    assert not any(hasattr(layer.self_attn, "paged_attention") for layer in model.model.layers)
    assert torch.equal(generate(model, inputs), tokens)
    stats = patch.stats()
    assert (stats["prompt_steps"], stats["decode_steps"]) == (1, 5)
    assert distance(prompt_logits(model, inputs), logits) < 1e-4
    assert distance(decode_logits(model, inputs), steps) < 1e-4
    stats = patch.stats()
    assert stats["exact_pages_in_use"] == 0
    patch.cache.check_integrity()
    cache = weakref.ref(patch.cache)
    unpatch_unsloth_attention(model)
    assert cache() is None  # its memory is free
    assert functions_now() == before and vars(model).get("forward") is forward
    assert torch.equal(generate(model, inputs), tokens)
    assert torch.equal(prompt_logits(model, inputs), logits)


@pytest.mark.parametrize("family", SERVED)
def test_pages_are_sealed_and_attended_and_cost_little(family, patched):
    model, inputs = model_of(family), batch()
    logits = prompt_logits(model, inputs)
    patch = patched(model, **RANKS)
    error = distance(prompt_logits(model, inputs), logits)
    first = patch.stats()
    sealing = sum(len(group.layers) for group in patch.cache.groups if group.seals)
    assert sealing == (1 if family == "gemma2" else 2)  # a short window stays exact
    assert first["pages_sealed"] == sealing * (2 + 1)  # two blocks of row 1, one of row 3
    assert 0 < error < 0.02
    if (rotary := model.model.rotary_emb) and FAMILIES[family].is_fast:  # keys are turned back by
        cos, sin = rotary.get_cached(2000)
        table = patch.cache.layers[0].rope
        for own, theirs in ((table.cos, cos), (table.sin, sin)):
            assert torch.allclose(own[:2000], theirs[:2000, :8], atol=1e-4)
    assert generate(model, inputs, 4).shape == (4, 4)
    assert patch.stats()["pages_attended"] >= first["pages_attended"] + 3 * first["pages_sealed"]
    patch.cache.check_integrity()


def test_a_row_is_what_it_is_alone(patched):
    model = model_of("llama")
    patched(model, **RANKS)
    inputs = batch()
    together = generate(model, inputs, 40)
    for row, length in enumerate(LENGTHS):
        alone = {name: x[row : row + 1, -length:] for name, x in inputs.items()}
        assert torch.equal(generate(model, alone, 40)[0], together[row])


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere"])
def test_how_prompts_are_cut_into_forwards_changes_nothing(family, patched, monkeypatch):
    model, inputs = model_of(family), batch()
    patch = patched(model, **RANKS)
    logits = prompt_logits(model, inputs), decode_logits(model, inputs)
    few = patch.stats()["prompt_steps"]
    monkeypatch.setattr(unsloth_prompt, "MAX_CHUNK_TOKENS", 300)
    assert distance(prompt_logits(model, inputs), logits[0]) < 1e-4
    assert distance(decode_logits(model, inputs), logits[1]) < 1e-4
    assert patch.stats()["prompt_steps"] > 2 * few


@pytest.mark.parametrize("family", unsloth_graphs.GRAPHED)
def test_steps_that_graphs_capture_are_the_steps_of_unsloth(family, patched, monkeypatch):
    """The captured function, run as it is; graphs themselves are tested on a GPU."""

    class Eager:
        num_graphs = 0

        def __init__(self, cache, forward):
            self.forward = forward
            Eager.num_graphs += 1

        def run(self, token_ids, positions, pending):
            assert token_ids == [0] * len(positions) and len(pending.rows) == len(positions)
            return self.forward(pending.ids, torch.tensor(positions)).float()

    model, inputs = model_of(family), batch()
    logits = decode_logits(model, inputs)
    patch = patched(model, kv_format="exact")
    monkeypatch.setattr(unsloth_graphs, "DecodeGraphs", Eager)
    changes = iter([1, 1, 2])
    monkeypatch.setattr(unsloth_graphs, "fingerprint", lambda *_: next(changes))
    forward = vars(model)["forward"]
    monkeypatch.setattr(forward, "graphs", unsloth_graphs.UnslothGraphs(model, patch.cache))
    for made in (1, 1, 2):  # once, and anew after weights have changed
        assert distance(decode_logits(model, inputs), logits) < 1e-4
        assert Eager.num_graphs == made
    assert patch.stats()["decode_steps"] == 15


@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_sampling_streaming_and_several_sequences_a_prompt_work_unchanged(family, patched):
    model, inputs = model_of(family), batch([30, 200])
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2}

    class Streamer:
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.pieces.append("end")

    def run():
        torch.manual_seed(5)
        sampled = generate(model, inputs, **options)
        streamer = Streamer()
        tokens = generate(model, batch([200]), streamer=streamer)[0].tolist()
        return sampled.tolist(), streamer.pieces, tokens

    before = run()
    patched(model, kv_format="exact")
    assert run() == before
    pieces, tokens = before[1:]
    assert pieces[1:] == [[token] for token in tokens] + ["end"]


@pytest.mark.parametrize("family", ["qwen3", "cohere"])
def test_beams_are_those_of_the_unpatched_model_and_share_pages(family, patched, monkeypatch):
    model, inputs = model_of(family), batch([30, 700])
    expected = generate(model, inputs, num_beams=3)
    patch = patched(model, kv_format="exact")
    forks, fork = [], patch.cache.fork
    monkeypatch.setattr(patch.cache, "fork", lambda *ids: forks.append(ids) or fork(*ids))
    assert torch.equal(generate(model, inputs, num_beams=3), expected)
    assert forks and patch.stats()["exact_pages_in_use"] == 0
    patch.undo()
    patch = patched(model, kv_format="exact", kv_cache_bytes=1 << 20)
    with pytest.raises(CapacityError):
        generate(model, batch([700]), num_beams=3)
    assert patch.stats()["exact_pages_in_use"] == 0
    patch.cache.check_integrity()


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_conversation_goes_on_from_its_past(family, patched):
    model, inputs = model_of(family), batch([30, 700])
    patch = patched(model, kv_format="exact")
    first = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    assert patch.stats()["exact_pages_in_use"] > 0
    turn = torch.full((2, 5), 11)
    longer = {
        "input_ids": torch.cat([first.sequences, turn], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 9).long()], dim=1),
    }
    warm = generate(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(warm, generate(model, longer))
    with pytest.raises(InvalidRequestError, match="columns, but its sequences have grown"):
        generate(model, longer, past_key_values=first.past_key_values)
    del first, warm
    assert patch.stats()["exact_pages_in_use"] == 0


@pytest.mark.parametrize("family", ["mistral", "cohere"])
def test_a_forward_that_fails_stores_nothing(family, patched, monkeypatch):
    model, inputs = model_of(family), batch([30, 1300])
    patch = patched(model, **RANKS)
    expected = generate(model, inputs)
    last = model.model.layers[1].mlp
    calls, run = [], last.forward

    def fail_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # between two chunks of the prompt
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    monkeypatch.setattr(last, "forward", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, inputs)
    assert torch.equal(generate(model, inputs), expected)
    with torch.no_grad():
        past = model(**batch([30, 700]), use_cache=True).past_key_values
    calls[:] = []
    more = torch.full((2, 700), 11)
    longer = {"input_ids": more, "attention_mask": None, "past_key_values": past}
    with torch.no_grad(), pytest.raises(InvalidRequestError, match="padding"):
        model(**longer, use_cache=True)  # earlier columns were padded
    longer["attention_mask"] = torch.cat([batch([30, 700])["attention_mask"], more > 0], dim=1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model(**longer, use_cache=True)
    with torch.no_grad(), pytest.raises(InvalidRequestError, match="half way"):
        model(**longer, use_cache=True)
    del past, longer
    assert patch.stats()["exact_pages_in_use"] == 0
    patch.cache.check_integrity()


def test_pages_are_computed_in_full_precision_under_autocast(patched):
    """`generate` runs under autocast, and so do the cache's calls inside it."""
    folder = model_of("llama").config._name_or_path
    model = unsloth_on_cpu.load(folder, torch.bfloat16)
    inputs, seen = batch([30, 1300]), []
    logits = decode_logits(model, inputs).float()
    patch = patched(model, **RANKS)
    seal = patch.cache.sealer.seal
    patch.cache.sealer.seal = lambda *args: (
        seen.append(torch.is_autocast_enabled("cpu")), seal(*args),
    )  # fmt: skip
    assert distance(decode_logits(model, inputs).float(), logits) < 0.05
    assert patch.stats()["pages_sealed"] == 4 and not any(seen) and len(seen) > 2


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
        ({"kv_format": "spectral-quality"}, "spectral-paged calibrate"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, match, patched):
    with pytest.raises(FormatError, match=match):
        patched(model_of("llama"), **options)


def test_options_are_fields_of_the_format(patched):
    patch = patched(
        model_of("llama"), k_rank_keys=16, k_rank_values=16, landmark_count=128,
        hot_buffer_size=192, prefill_segment=1024, exempt_layers=[0],
    )  # fmt: skip
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


def test_the_benchmark_times_patched_and_unpatched_alike():
    model = model_of("mistral")
    rows = [
        measure(model, format, 2, 600, short=2, long=6, **options)
        for format, options in (("unpatched", {}), ("exact", {"kv_cache_bytes": 16 << 20}))
    ]
    assert rows[0].first_tokens == rows[1].first_tokens
    assert all(row.decode_tokens_per_second > 0 < row.prompt_seconds for row in rows)
    assert rows[0].bytes_per_token is None and rows[1].bytes_per_token > 0
    assert "forward" not in vars(model)
