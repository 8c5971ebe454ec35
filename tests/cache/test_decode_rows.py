"""Decode steps count most sequences and visit few; what they find is what a visit would find."""

from __future__ import annotations

import numpy as np
import pytest

from spectral_paged.cache import replace_encoders
from spectral_paged.cache.row_counts import next_edge
from spectral_paged.cache.sequences import SequenceState, StepRules
from support.cache_feed import NoEncoder, fmt, make

FULL = None
WINDOWS = {"none": FULL, "short": 200, "odd": 77, "sealed": 1100, "both": (1300, 130)}


def cache_of(windows, format=None):
    cache = make(format, sliding_windows=WINDOWS[windows], kv_cache_bytes=24 << 20)
    replace_encoders(cache, lambda encoder: NoEncoder())
    return cache


def grow(cache, prompts, total, *, pins=None):
    """Open steps, without K and V, until all sequences have `total` tokens; yields in each."""
    pins = pins or {}
    ids = {name: list(range(prompt)) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        spans = pins.get(name, ())
        cache.add_sequence(name, num_prompt_tokens=prompt, token_ids=ids[name], pinned_spans=spans)
    while any(cache.num_tokens(name) < total for name in prompts):
        step = {}
        for name, prompt in prompts.items():
            done = cache.num_tokens(name)
            if done < prompt:
                step[name] = min(prompt - done, cache.chunk_limit(name))
            elif done < total:
                step[name] = 1
                ids[name].append(done)
        plan = cache.reserve(step)
        assert plan is not None
        cache.begin_step(plan)
        yield plan
        cache.end_step()
        cache.check_integrity()


def as_visited(cache, plan):
    """The rows of a step, each from its sequence's slots alone: one array a group."""
    found = []
    for place, group in enumerate(cache.groups):
        columns = []
        for entry in plan.entries:
            if entry.num_new > 1:
                continue
            slots = cache._sequences.by_id[entry.seq_id].slots[place]
            first = entry.start - slots.tail_start
            visible = max(0, entry.start + 1 - group.window) if group.window else 0
            hidden = slots.exact_before(visible) if group.window else 0
            unit = int(group.exact_table.host[slots.row, first // 64])
            columns.append(
                (unit, first % 64, slots.row, first + 1, slots.num_sealed, hidden, visible)
            )
        found.append(np.array(columns, np.int32).reshape(-1, 7).T)
    return found


@pytest.mark.parametrize("windows", WINDOWS)
def test_rows_that_go_on_say_what_the_slots_say(windows):
    cache = cache_of(windows)
    prompts = {"a": 1, "b": 63, "c": 700, "d": 1215, "e": 1536}
    pins = {"d": ((100, 130), (1100, 1101)), "e": ((600, 601),)}
    num_decodes = 0
    for plan in grow(cache, prompts, 1900, pins=pins):
        for index, want in zip(cache.open_step.index, as_visited(cache, plan), strict=True):
            assert np.array_equal(index.decode, want), (plan.entries, windows)
            num_decodes += want.shape[1]
    assert num_decodes > 3000


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("hot", [0, 128])
def test_quiet_sequences_have_nothing_to_be_visited_for(monkeypatch, windows, hot):
    """The same steps, once visited where something may happen, once everywhere."""
    prompts, kept = {"a": 1, "b": 130, "c": 1088, "d": 1215}, []
    for everywhere in (False, True):
        if everywhere:
            monkeypatch.setattr(StepRules, "quiet_until", lambda self, position: position)
        cache, seen = cache_of(windows, fmt(hot_tokens=hot)), []
        for plan in grow(cache, prompts, 1800):
            rows = [index.decode.tolist() for index in cache.open_step.index]
            held = {
                s: [(tuple(g.exact), tuple(g.pages), g.first_page) for g in state.slots]
                for s, state in cache._sequences.by_id.items()
            }
            stats = cache.stats()
            seen.append((plan.entries, rows, held, stats["pages_sealed"], stats["pages_attended"]))
        kept.append((seen, [len(s.chain) for s in cache._sequences.by_id.values()]))
    assert kept[0] == kept[1]


def test_a_step_visits_the_sequences_whose_token_begins_or_ends_an_exact_page(monkeypatch):
    cache, visits, store = cache_of("none", fmt("exact")), [], SequenceState.store
    monkeypatch.setattr(
        SequenceState, "store", lambda self, n: (visits.append(self.num_tokens), store(self, n))
    )
    prompts = {f"s{i}": 100 + 7 * i for i in range(8)}
    steps = list(grow(cache, prompts, 400))
    assert len(steps) > 290
    decoded = [at for at in visits if at >= 160]
    assert len(decoded) >= 8 * 6 and all(at % 64 in (0, 63) for at in decoded)


@pytest.mark.parametrize("origin", [0, 1, 63, 76, 1299])
def test_an_edge_is_a_token_that_begins_or_ends_a_span(origin):
    for position in range(200):
        edges = [p for p in range(position, position + 65) if (p - origin) % 64 in (0, 63)]
        assert next_edge(position, origin) == edges[0]


def test_a_sequence_whose_token_ids_come_late_is_visited_until_its_page_is_published():
    cache = cache_of("none", fmt("exact"))
    ids = list(range(60))
    cache.add_sequence("a", num_prompt_tokens=60, token_ids=ids)
    for step in [{"a": 60}] + [{"a": 1}] * 12:
        cache.begin_step(cache.reserve(step))
        cache.end_step()
        if cache.num_tokens("a") > 67:
            ids.append(0)  # eight tokens late
    assert cache.num_tokens("a") == 72 and len(ids) == 65
    assert len(cache._sequences.by_id["a"].chain) == 1
    cache.free("a")
    assert cache.add_sequence("b", num_prompt_tokens=70, token_ids=[*ids, *range(5)]) == 64
