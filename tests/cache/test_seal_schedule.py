"""Blocks are sealed ahead of their deadline, evenly over steps, and without changing a token."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.cache.seal_schedule import sealed_ahead
from support.tiny_model import random_prompts, tiny_format, tiny_llm

WINDOW = 64


def steps_of(completions, window=WINDOW):
    """Blocks sealed in each step where block i completes after step `completions[i]`."""
    waiting, counts = {}, []
    for now in range(max(completions) + window + 1):
        for i, at in enumerate(completions):
            if at == now:
                waiting[f"s{i}"] = now + window
        chosen = sealed_ahead((end - now, name, 0) for name, end in waiting.items())
        for name, _ in chosen:
            assert waiting.pop(name) > now, "too late: the next query sees it as a page"
        counts.append(len(chosen))
    assert not waiting
    return counts


@given(st.lists(st.integers(0, 300), min_size=1, max_size=200))
def test_every_block_is_sealed_before_it_is_visible(completions):
    assert sum(steps_of(completions)) == len(completions)


@pytest.mark.parametrize("count, most", [(1, 1), (64, 1), (65, 2), (128, 2), (256, 4)])
def test_blocks_that_complete_together_are_spread_over_the_window(count, most):
    assert max(steps_of([10] * count)) == most


@given(st.lists(st.integers(0, 120), min_size=1, max_size=150))
def test_no_step_seals_more_than_the_fullest_window_needs(completions):
    """A window of W steps in which n blocks end needs n / W a step; the rule takes no more."""
    ends = [at + WINDOW for at in completions]
    # every wait that lies between one block's completion and another's end must hold its blocks
    need = max(
        -(-sum(at >= begin and end <= last for at, end in zip(completions, ends)) // (last - begin))
        for begin in completions
        for last in ends
        if last > begin
    )
    assert max(steps_of(completions)) <= need


@pytest.mark.parametrize("hot, ahead", [(64, True), (0, False)])
def test_a_batch_of_one_length_seals_a_block_a_step_and_says_the_same(hot, ahead):
    prompts = random_prompts([570] * 8, seed=7)
    params = SamplingParams(temperature=0.0, max_tokens=96)
    format = dataclasses.replace(tiny_format(), hot_tokens=hot)
    alone = [tiny_llm(format).generate([p], params, use_tqdm=False)[0] for p in prompts]
    llm = tiny_llm(format)
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    sealed, done, before = [], {}, 0
    while llm.engine.has_unfinished():
        done |= {o.request_id: o for o in llm.engine.step()}
        sealed.append(llm.cache.counters.pages_sealed - before)
        before = llm.cache.counters.pages_sealed
        llm.cache.check_integrity()
    together = [done[str(i)].outputs[0].token_ids for i in range(8)]
    assert together == [o.outputs[0].token_ids for o in alone]
    assert sum(sealed) >= 8 * 2 and (max(sealed) == 2) == ahead  # two layers
