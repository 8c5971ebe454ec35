"""Unsloth's own prompts and one-token steps over the cache.

`test_unsloth.py` runs this file in a new process, because importing Unsloth changes transformers.
"""

from __future__ import annotations

import weakref

import pytest
import torch

from spectral_paged.errors import CapacityError, InvalidRequestError
from spectral_paged.integrations.unsloth import (
    graphs as unsloth_graphs,
    prompt as unsloth_prompt,
    unpatch_unsloth_attention,
)
from spectral_paged.integrations.unsloth.families import FAMILIES
from support import unsloth_on_cpu
from support.unsloth_checkpoints import (
    GREEDY,
    LENGTHS,
    RANKS,
    batch,
    decode_logits,
    distance,
    generate,
    prompt_logits,
)
from support.unsloth_on_cpu import functions_now, model_of

pytest_plugins = ["support.unsloth_on_cpu"]
SERVED = list(FAMILIES)


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
            assert token_ids == [0] * len(positions) and len(pending.sources) == len(positions)
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
        seen.append(torch.is_autocast_enabled("cpu")),
        seal(*args),
    )
    assert distance(decode_logits(model, inputs).float(), logits) < 0.05
    assert patch.stats()["pages_sealed"] == 4 and not any(seen) and len(seen) > 2
