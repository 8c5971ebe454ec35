"""Inputs of CUDA graphs of a decode step; the graphs run in `test_engine_gpu.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.cache import DecodeRows, prefix_tiles
from spectral_paged.kernels.exact.reference import exact_append
from spectral_paged.models.decode_graphs import (
    batch_sizes,
    graph_capacities,
    graph_capacity,
    known_tokens,
)
from spectral_paged.models.static_inputs import (
    NOWHERE,
    DecodeInputs,
    StaticInputs,
    TokenRows,
    fill_inputs,
)
from spectral_paged.sampling import PendingTokens
from support.foretold_drafts import SPECULATION, foretell
from support.tiny_model import VOCAB, random_prompts, tiny_format, tiny_llm


@given(st.integers(1, 1024), st.data())
def test_every_batch_has_a_size_that_wastes_little(max_num_seqs, data):
    count = data.draw(st.integers(1, max_num_seqs))
    sizes = batch_sizes(max_num_seqs)
    size = next(s for s in sizes if s >= count)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    assert size - count <= max(7, count // 4)


@given(st.integers(0, 1 << 20))
def test_a_graph_has_room_for_the_pages_of_its_step(count):
    assert graph_capacity(count) >= count and (graph_capacity(count) == 0) == (count == 0)


@given(st.integers(0, 1 << 20), st.data())
def test_a_warm_up_knows_every_room_that_a_step_may_need(most, data):
    count = data.draw(st.integers(0, most))
    sizes = graph_capacities(most)
    assert graph_capacity(count) in sizes and sizes[-1] == graph_capacity(most)


def test_tokens_that_only_the_device_knows_are_taken_from_it():
    ids, sources = torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([-1, 1, 0])
    assert known_tokens(ids, sources, torch.tensor([50, 60])).tolist() == [5, 60, 50]


def test_a_place_without_a_token_is_stored_nowhere():
    plane = torch.full((4096,), 7, dtype=torch.uint8)
    k, v = torch.ones(2, 3, 1, 2)
    positions = torch.tensor([-1, 8, -1], dtype=torch.int32)
    exact_append(k, v, plane, positions, torch.tensor([0, 3, 0], dtype=torch.int32))
    changed = (plane != 7).nonzero().squeeze(-1)
    assert changed.min() >= 8 * 128 and len(changed) <= 2 * 2 * 4


@pytest.mark.parametrize("exempt, drafts", [((), False), ((1,), False), ((1,), True)])
def test_a_padded_batch_of_fixed_shape_says_what_the_step_says(exempt, drafts):
    """The step that a graph captures, run eagerly through the same static inputs."""
    prompts = random_prompts([1, 64, 700, 1300], seed=3)
    params = SamplingParams(temperature=0.0, max_tokens=70)
    want = tiny_llm(tiny_format(), exempt_layers=exempt).generate(prompts, params, use_tqdm=False)
    speculation = SPECULATION if drafts else None
    llm = tiny_llm(tiny_format(), exempt_layers=exempt, speculative_config=speculation)
    if drafts:
        said = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in want}
        foretell(
            llm.engine,
            lambda c, _: c.owner.prompt_token_ids + said[tuple(c.owner.prompt_token_ids)],
            VOCAB,
        )
    size = 40 if drafts else 8
    cache, runner = llm.cache, llm.engine.runner
    eager, replayed, inputs = runner.forward, [], StaticInputs(cache, size)
    inputs._device.fill_(99)

    def by_static_inputs(plan, token_ids, logit_rows, pending=None):
        if not plan.is_decode or len(logit_rows) < len(token_ids):
            return eager(plan, token_ids, logit_rows, pending)
        inputs.fill(token_ids, plan.positions, pending)
        tokens = inputs.tokens(size)
        sampled = torch.zeros(size, dtype=torch.int64)
        if pending is not None:
            sampled[: len(pending.ids)] = pending.ids
        ids = known_tokens(tokens.ids, tokens.sources, sampled)
        with inputs.reading(inputs.steps(size, 64)), torch.inference_mode():
            replayed.append(len(token_ids))
            return runner._logits(ids, tokens.positions.long(), None).float()[: len(token_ids)]

    runner.forward = by_static_inputs
    for ahead in (False, True):
        llm.engine.async_scheduling = ahead
        got = llm.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
        cache.check_integrity()
        cache.reset_prefix_cache()
    most = (20, 4 + 7) if drafts else (100, 4)
    assert len(replayed) > most[0] and (max(replayed) > most[1] if drafts else max(replayed) == 4)


def test_a_padded_batch_of_fixed_shape_has_the_tiles_of_the_step(monkeypatch):
    """The step that a graph with tiles captures; its tiles are written when they change alone."""
    monkeypatch.setattr(prefix_tiles, "MIN_PAGES", 1)
    [document, *questions] = random_prompts([1250, 3, 1, 64, 20], seed=3)
    prompts = [[*document, *question] for question in questions]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (30, 12, 30, 30)]
    llm = tiny_llm(tiny_format())
    want = llm.generate(prompts, params, use_tqdm=False)
    llm = tiny_llm(tiny_format(), disable_cascade_attn=False)
    llm.generate([document], SamplingParams(max_tokens=1), use_tqdm=False)
    cache, runner = llm.cache, llm.engine.runner
    eager, inputs, replayed, written = runner.forward, StaticInputs(cache), [], []
    inputs._device.fill_(99)
    seat = inputs._seat
    monkeypatch.setattr(inputs, "_seat", lambda tiles: (written.append(1), seat(tiles)))

    def by_static_inputs(plan, token_ids, logit_rows, pending=None):
        if not plan.is_decode or not inputs.tile_blocks:
            return eager(plan, token_ids, logit_rows, pending)
        inputs.fill(token_ids, plan.starts, pending)
        tokens = inputs.tokens(8)
        steps = inputs.steps(8, graph_capacity(inputs.own_blocks), 64)
        assert all(step.decode.pages.shared is not None for step in steps)
        ids = tokens.ids.long()
        with inputs.reading(steps), torch.inference_mode():
            replayed.append(len(token_ids))
            return runner._logits(ids, tokens.positions.long(), None).float()[: len(token_ids)]

    runner.forward = by_static_inputs
    llm.engine.async_scheduling = False
    got = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    assert len(replayed) > 20 and set(replayed) == {3, 4} and 2 <= len(written) < 8
    inputs.clear()
    assert not inputs._tiles.any()


def test_inputs_past_the_step_are_nowhere():
    staging = np.full((DecodeInputs.num_rows(1), 6), 77, dtype=np.int32)
    pending = PendingTokens(torch.tensor([9]), [-1, 0])

    class Index:
        decode = DecodeRows([4, 8], [1, 2], [3, 5], [10, 20], [0, 1], [6, 0], [70, 0])

    fill_inputs(staging, [11, 0], [7, 8], pending, [Index])
    assert staging[:3].tolist() == [[11, 0] + [0] * 4, [-1, 0] + [-1] * 4, [7, 8] + [0] * 4]
    assert staging[3].tolist() == [4, 8] + [NOWHERE] * 4
    assert staging[4:].tolist() == [
        [1, 2] + [0] * 4,
        [3, 5] + [0] * 4,
        [10, 20] + [0] * 4,
        [0, 1] + [0] * 4,
        [6, 0] + [0] * 4,
        [70, 0] + [0] * 4,
    ]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_inputs_of_no_step_hold_sequences_without_tokens(num_groups):
    """What runs before a capture: nothing is read, nothing is stored."""
    staging = np.full((DecodeInputs.num_rows(num_groups), 5), 77, dtype=np.int32)
    fill_inputs(staging, [], [], None, [])
    tokens, groups = DecodeInputs.of(staging)
    assert TokenRows(*tokens.tolist()) == TokenRows([0] * 5, [NOWHERE] * 5, [0] * 5)
    assert len(groups) == num_groups
    for rows in groups:
        assert DecodeRows(*rows.tolist()) == DecodeRows([NOWHERE] * 5, *[[0] * 5] * 6)
