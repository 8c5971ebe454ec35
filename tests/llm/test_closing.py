"""A closed LLM restores the model that it borrowed, and frees its memory."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

from spectral_paged import LLM, SamplingParams, SpectralKVCache
from spectral_paged.errors import SpectralPagedError
from spectral_paged.models import runner
from spectral_paged.models.runner import ModelRunner, compiled_parts
from support.at_a_line import at_a_line
from support.tiny_model import random_prompts, tiny_format, tiny_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=4)
IDS = torch.arange(5, 45)[None]


def borrow(model):
    return LLM.from_model(
        model, kv_format=tiny_format("spectral-int8"), kv_cache_bytes=8 << 20, max_num_seqs=4
    )


def test_a_closed_llm_leaves_the_model_as_it_was():
    model = tiny_model()
    attention, logits = model.config._attn_implementation, model(IDS).logits
    with borrow(model) as llm:
        llm.generate(random_prompts([700]), PARAMS, use_tqdm=False)
        assert model.config._attn_implementation != attention
    assert model.config._attn_implementation == attention
    assert torch.equal(model(IDS).logits, logits)
    llm.close()  # again: nothing
    for use in (lambda: llm.generate([[1, 2]]), llm.stats, lambda: llm.cache):
        with pytest.raises(SpectralPagedError, match="was closed: make another"):
            use()
    assert not hasattr(LLM, "nonsense")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = llm.nonsense


def test_memory_is_back_without_a_collector():
    llm = borrow(tiny_model())
    llm.generate(random_prompts([700]), PARAMS, use_tqdm=False)
    arena = weakref.ref(llm.cache.groups[0].arena.planes)
    gc.collect()
    gc.disable()
    try:
        llm.close()
        assert arena() is None
    finally:
        gc.enable()


def test_the_last_of_two_llms_gives_the_model_back():
    model = tiny_model()
    attention = model.config._attn_implementation
    first, second = borrow(model), borrow(model)
    prompts = random_prompts([700])
    want = [o.outputs[0].token_ids for o in first.generate(prompts, PARAMS, use_tqdm=False)]
    first.close()
    got = [o.outputs[0].token_ids for o in second.generate(prompts, PARAMS, use_tqdm=False)]
    assert got == want
    second.close()
    assert model.config._attn_implementation == attention


def test_an_eager_llm_beside_a_compiled_one_leaves_it_its_graph_break(monkeypatch):
    """Both look attention up by one name; traced, it would be compiled anew for every step."""
    traced, attend = [], SpectralKVCache.attend

    def watched(*args):
        traced.append(torch.compiler.is_compiling())
        return attend(*args)

    monkeypatch.setattr(SpectralKVCache, "attend", watched)
    model = tiny_model()
    with borrow(model) as llm, borrow(tiny_model()):
        for part in compiled_parts(model):  # as on a GPU
            part.compile(dynamic=True, backend="eager")
        llm.generate(random_prompts([20]), PARAMS, use_tqdm=False)
    assert traced and not any(traced)


def test_an_llm_that_nobody_holds_gives_the_model_back():
    model = tiny_model()
    attention = model.config._attn_implementation
    llm = borrow(model)
    del llm
    gc.collect()
    assert model.config._attn_implementation == attention


def test_a_runner_that_is_freed_at_any_line_of_another_ones_start_keeps_the_models_own_attention():
    model = tiny_model()
    attention = model.config._attn_implementation
    with borrow(model) as llm:
        cache = llm.cache
    for line in itertools.count():
        held = [ModelRunner(model, cache)]
        with at_a_line(line, held.clear, runner) as done:
            other = ModelRunner(model, cache)
        held.clear()
        assert model.config._attn_implementation != attention
        other.close()
        assert model.config._attn_implementation == attention
        if not done:
            break
    assert line > 10


def test_a_stream_that_is_open_ends_with_the_reason():
    llm = borrow(tiny_model())
    stream = llm.stream(random_prompts([20]), SamplingParams(temperature=0.0, max_tokens=50))
    next(stream)
    llm.close()
    with pytest.raises(SpectralPagedError, match="was closed"):
        list(stream)
