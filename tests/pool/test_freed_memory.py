"""A cache's memory is free once no reference is left, without the garbage collector.

A GPU that runs out of memory starts no collection.
"""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from spectral_paged import LLM, SamplingParams
from spectral_paged.pool.slot_pool import SlotKind
from support.cache_feed import slots_of
from support.padded_batch import attending_model, batch, generated, paged_cache
from support.small_cache import feed, small_cache
from support.tiny_model import random_prompts, tiny_format, tiny_model

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@contextmanager
def without_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def arenas_of(cache):
    return [weakref.ref(group.arena.planes) for group in cache.groups]


def all_gone(arenas):
    return all(arena() is None for arena in arenas)


def test_of_a_cache_that_has_sealed():
    with without_garbage_collection():
        cache = small_cache()
        cache.add_sequence("a", num_prompt_tokens=1200)
        feed(cache, ["a"], 1300)
        assert cache.stats()["pages_in_use"]
        arenas = arenas_of(cache)
        assert not all_gone(arenas)
        del cache
        assert all_gone(arenas)


def test_of_a_transformers_cache_that_was_generated_with():
    model = attending_model()
    with without_garbage_collection():
        cache = paged_cache(model)
        generated(model, batch((5, 700)), cache)
        arenas = arenas_of(cache.kv_cache)
        cache.reset()
        del cache
        assert all_gone(arenas)


def test_of_a_copy_apart_from_its_original():
    """A copied pool moves and poisons slots of its own."""
    cache = small_cache()
    cache.add_sequence("a", num_prompt_tokens=700)
    cache.reserve({"a": 64})
    copied = copy.deepcopy(cache)
    group = copied.groups[0]
    blocks = group.arena.slots
    slot = slots_of(copied, "a").exact[0]
    target = blocks.allocate(SlotKind.EXACT)
    blocks.on_move([(SlotKind.EXACT, slot, target)])
    assert slots_of(copied, "a").exact == [target] and slots_of(cache, "a").exact == [slot]
    group.arena.planes.zero_()
    blocks.on_free(SlotKind.EXACT, target)
    assert group.arena.planes.any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_of_an_llm_that_has_served(device):
    """On CUDA its graphs hold their runner's forward."""
    options = {"kv_cache_bytes": 16 << 20, "max_num_seqs": 4, "compile_layers": False}
    with without_garbage_collection():
        llm = LLM.from_model(tiny_model().to(device), kv_format=tiny_format(), **options)
        greedy = SamplingParams(temperature=0.0, max_tokens=4)
        llm.generate(random_prompts([700, 5], 1), greedy, use_tqdm=False)
        arenas = arenas_of(llm.cache)
        del llm
        assert all_gone(arenas)
