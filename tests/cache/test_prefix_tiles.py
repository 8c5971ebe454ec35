"""Sequences that begin with the same pages sit in tiles, and answers do not depend on it."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spectral_paged import SamplingParams
from spectral_paged.cache import prefix_tiles, replace_encoders
from spectral_paged.cache.prefix_tiles import MIN_PAGES, MOST_READS, PrefixTiles
from spectral_paged.pool.block_table import BlockTable
from support.cache_feed import Feed, NoEncoder, drive, make, slots_of
from support.tiny_model import random_prompts, tiny_format, tiny_llm

WIDTH = 12


def block_table(lines, width=WIDTH):
    table = BlockTable(max(len(lines), 1), width, 999, torch.device("cpu"))
    for row, line in enumerate(lines):
        table.write(row, 0, line)
    return table


def most_saved(lines, seats, depth=0):
    """The most reads that tiles save of rows that share `depth` entries, by a dictionary of each
    next entry."""
    tiles = min(-(-len(lines) // seats), len(lines) // 2)
    together = (min(len(lines), tiles * seats) - tiles) * depth if depth >= MIN_PAGES else 0
    parts = defaultdict(list)
    for line in lines:
        if len(line) > depth:
            parts[line[depth]].append(line)
    apart = sum(most_saved(part, seats, depth + 1) for part in parts.values() if len(part) > 1)
    return max(together, apart)


def check(lines, found, seats):
    """Tiles are of rows that begin alike, and save as much as a dictionary of the rows finds."""
    reads, best = sum(map(len, lines)), most_saved(lines, seats)
    if found is None:
        assert reads - best > MOST_READS * reads or not best
        return
    tiles = defaultdict(list)
    for row, (seat, start) in enumerate(found.columns.T.tolist()):
        assert (seat > 0) == (start > 0)
        if seat:
            tiles[(seat - 1) // seats].append(((seat - 1) % seats, row, start))
    assert sorted(tiles) == list(range(len(tiles)))
    of_tiles = 0
    for members in tiles.values():
        assert sorted(place for place, _, _ in members) == list(range(len(members)))
        assert 2 <= len(members) <= seats
        [depth] = {start for _, _, start in members}
        assert depth >= MIN_PAGES and all(len(lines[row]) >= depth for _, row, _ in members)
        assert len({tuple(lines[row][:depth]) for _, row, _ in members}) == 1
        of_tiles += depth
    assert found.tile_entries == of_tiles
    assert found.own_entries == reads - int(found.columns[1].sum())
    assert found.own_entries + of_tiles == reads - best <= MOST_READS * reads


@st.composite
def beginnings(draw):
    """Rows of a tree of pages: few different entries, so that many rows begin alike."""
    base = draw(st.lists(st.integers(0, 1), min_size=WIDTH, max_size=WIDTH))
    lines = []
    for row in range(draw(st.integers(0, 14))):
        shared, more = draw(st.integers(0, WIDTH)), draw(st.integers(0, 3))
        other = draw(st.lists(st.integers(0, 1), min_size=0, max_size=2))
        line = [*base[:shared], *other]
        line = [10 * at + entry for at, entry in enumerate(line)]
        lines.append((line + [1000 + 10 * row + i for i in range(more)])[:WIDTH])
    return lines


@settings(max_examples=300, deadline=None)
@given(lines=beginnings(), seats=st.integers(2, 6), holes=st.booleans())
def test_tiles_save_the_most_reads_that_a_dictionary_of_the_rows_finds(lines, seats, holes):
    if holes:  # pinned blocks, which all of a family have
        lines = [[-1 if at == 1 else x for at, x in enumerate(line)] for line in lines]
    blocks = np.array([len(line) for line in lines], np.int64)
    found = PrefixTiles(block_table(lines), seats).of(np.arange(len(lines)), blocks)
    check(lines, found, seats)
    if found is not None and not holes:
        reads = int(blocks.sum())
        assert found.pages_saved == reads - found.own_entries - found.tile_entries
    if found is not None and holes:
        tiles = {(s - 1) // seats: d for s, d in found.columns.T.tolist() if s}
        own = int(found.columns[1].sum()) - int((found.columns[0] > 0).sum())
        assert found.pages_saved == own - sum(depth - 1 for depth in tiles.values())


@pytest.mark.parametrize("seats, sharers", [(4, 64), (2, 3), (5, 6), (16, 17), (4, 2), (2, 64)])
def test_sharers_of_a_document_sit_evenly(seats, sharers):
    lines = [[*range(8), 100 + i] for i in range(sharers)]
    found = PrefixTiles(block_table(lines), seats).of(np.arange(sharers), np.full(sharers, 9))
    sizes = np.bincount((found.columns[0][found.columns[0] > 0] - 1) // seats)
    assert sizes.max() - sizes.min() <= 1 and sizes.min() >= 2
    assert len(sizes) == min(-(-sharers // seats), sharers // 2)


def test_a_system_prompt_of_all_does_not_hide_the_documents_of_some():
    """Five pages that all share, and twenty more in each of two families."""
    lines = [
        [*range(5), *range(100 * f, 100 * f + 20), 900 + f, i] for f in (1, 2) for i in range(8)
    ]
    table = block_table(lines, 40)
    found = PrefixTiles(table, 4).of(np.arange(16), np.full(16, 27))
    assert set(found.columns[1].tolist()) == {26} and found.tile_entries == 4 * 26


class Tables(RuleBasedStateMachine):
    """Rows of a table that are attached, forked, sealed, moved and freed, as caches write them."""

    def __init__(self):
        super().__init__()
        self.next = 0
        self.table = BlockTable(10, WIDTH, 999, torch.device("cpu"))
        self.lines: dict[int, list[int]] = {}
        self.tiles = PrefixTiles(self.table, 3)
        self.rows = np.zeros(0, np.int64)

    def write(self, row, line):
        self.lines[row] = line
        self.table.write(row, 0, line)

    def fresh(self, count):
        self.next += count
        return list(range(self.next - count, self.next))

    @rule(row=st.integers(0, 9), count=st.integers(0, WIDTH - 3))
    def add(self, row, count):
        self.write(row, self.fresh(count))

    @precondition(lambda self: self.lines)
    @rule(row=st.integers(0, 9), data=st.data())
    def fork_or_hit(self, row, data):
        parent = self.lines[data.draw(st.sampled_from(sorted(self.lines)))]
        count = data.draw(st.one_of(st.just(len(parent)), st.integers(0, len(parent))))
        self.write(row, parent[:count])

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def seal(self, data):
        row = data.draw(st.sampled_from(sorted(self.lines)))
        if len(self.lines[row]) < WIDTH:
            self.write(row, [*self.lines[row], *self.fresh(1)])

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def free_or_preempt(self, data):
        row = data.draw(st.sampled_from(sorted(self.lines)))
        self.write(row, [])
        del self.lines[row]

    @precondition(lambda self: self.lines)
    @rule(by=st.integers(1, 5))
    def move_slots(self, by):
        for row, line in list(self.lines.items()):
            self.write(row, [x + 1000 * by for x in line])

    @rule(data=st.data())
    def choose_the_batch(self, data):
        chosen = data.draw(st.permutations(sorted(self.lines)))
        self.rows = np.array(chosen[: data.draw(st.integers(0, len(chosen)))], np.int64)

    @invariant()
    def the_plan_is_that_of_the_rows(self):
        rows = np.array([row for row in self.rows if row in self.lines], np.int64)
        lines = [self.lines[row] for row in rows]
        found = self.tiles.of(rows, np.array([len(line) for line in lines], np.int64))
        check(lines, found, 3)
        if found is not None:
            again = self.tiles.of(rows.copy(), np.array([len(line) for line in lines]))
            assert again is found, "a steady step finds the tiles that it has"


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# ---- the cache and the engine ------------------------------------------------------------


def run_step(cache, new):
    """One step without K and V, whose tiles must be those that the held slots ask for."""
    plan = cache.reserve(new)
    assert plan is not None
    cache.begin_step(plan)
    [index], [group] = cache.open_step.index, cache.groups
    decodes = [e.seq_id for e in plan.entries if e.num_new == 1]
    lines = [slots_of(cache, s).pages[: slots_of(cache, s).num_sealed] for s in decodes]
    check(lines, index.tiles, group.tiles.seats)
    cache.end_step()
    cache.check_integrity()
    return index.tiles


@pytest.mark.parametrize("seed", range(3))
def test_tiles_follow_forks_aborts_preemptions_and_hits(seed):
    """A family of prompts of three pages and more, in any order of what an engine does."""
    random = Random(seed)
    cache = make(max_num_seqs=12, kv_cache_bytes=24 << 20, disable_cascade_attn=False)
    replace_encoders(cache, lambda encoder: NoEncoder())
    documents = [[10 * d + i % 7 for i in range(64 + (5 + d) * 512 + 64)] for d in range(2)]
    ids, prompts, seen, name = {}, {}, 0, 0

    def add(tokens, prompt):
        nonlocal name
        name += 1
        ids[str(name)], prompts[str(name)] = list(tokens), prompt
        cached = cache.add_sequence(str(name), num_prompt_tokens=prompt, token_ids=ids[str(name)])
        assert cached is not None

    for _ in range(120):
        what = random.choice(("add", "add", "fork", "free", "preempt", "step", "step", "step"))
        if what == "add" and len(ids) < 12:
            own = [random.randrange(100, 200) for _ in range(random.choice((1, 40, 600)))]
            tokens = random.choice(documents) + own
            add(tokens, len(tokens))
        elif what == "fork" and 0 < len(ids) < 12:
            parent = random.choice(sorted(ids))
            name += 1
            assert cache.fork(parent, str(name), token_ids=list(ids[parent]))
            ids[str(name)], prompts[str(name)] = list(ids[parent]), prompts[parent]
        elif what in ("free", "preempt") and ids:
            gone = random.choice(sorted(ids))
            cache.free(gone)
            tokens, prompt = ids.pop(gone), prompts.pop(gone)
            if what == "preempt":
                add(tokens, prompt)
        elif what == "step" and ids:
            new = {}
            for s in random.sample(sorted(ids), random.randint(1, len(ids))):
                left = len(ids[s]) - cache.num_tokens(s)
                if not left:
                    ids[s].append(random.randrange(200))
                new[s] = min(max(left, 1), cache.chunk_limit(s))
            seen += run_step(cache, new) is not None
    assert seen > 3, "tiles were there"


@pytest.fixture
def few(monkeypatch):
    """Groups of any number of pages, in steps of which a little is shared."""
    monkeypatch.setattr(prefix_tiles, "MIN_PAGES", 1)
    monkeypatch.setattr(prefix_tiles, "MOST_READS", 1.0)


@pytest.mark.parametrize("window", [None, 1300])
def test_forks_attend_to_shared_pages_as_alone(few, window):
    """Three tiles' worth of forks and a stranger; the window's layers read every page alone."""
    outs, shared = [], []
    for off in (True, False):
        cache = make(sliding_windows=(None, window), max_num_seqs=12, disable_cascade_attn=off)
        lengths = {"a": 1300, "b": 700}
        feeds = {name: Feed(i, 1400) for i, name in enumerate(lengths)}
        drive(cache, feeds, lengths, lengths)
        names = [f"f{i}" for i in range(7)]
        for name in names:
            assert cache.fork("a", name)
            feeds[name] = feeds["a"]
        prompts = lengths | dict.fromkeys(names, 1300)
        outs.append(drive(cache, feeds, prompts, {n: t + 3 for n, t in prompts.items()}))
        for name in names[:6]:
            cache.free(name)
        more = {n: prompts[n] + 5 for n in ("a", "b", "f6")}
        outs[-1] |= {
            f"{n} later": x
            for n, x in drive(cache, {n: feeds[n] for n in more}, prompts, more).items()
        }
        shared.append(cache.stats()["pages_shared"])
    steps, layers = 3, 1 if window else 2
    # eight sequences read two pages in two tiles (three query heads a KV head), then two in one
    assert shared == [0, layers * 2 * (steps * (8 - 2) + 2 * (2 - 1))]
    for name, want in outs[0].items():
        got = outs[1][name]
        known = ~torch.isnan(want)
        assert torch.equal(known, ~torch.isnan(got))
        assert torch.allclose(got[known], want[known], atol=2e-5), name


@pytest.mark.parametrize("kind", ["n", "prefix", "exempt"])
def test_tokens_are_equal_with_and_without_tiles(few, kind):
    [document, *questions] = random_prompts([1400, 5, 70, 1, 40, 33, 64], seed=5)
    prompts, n = [[*document, *question] for question in questions], 1
    options = {}
    if kind == "n":
        prompts, n = prompts[:2], 4
    if kind == "exempt":
        options["exempt_layers"] = (0,)
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=24, n=n)
    found = []
    for off in (True, False):
        llm = tiny_llm(tiny_format(), disable_cascade_attn=off, **options)
        llm.generate([document], SamplingParams(max_tokens=1), use_tqdm=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([c.token_ids for o in outputs for c in o.outputs])
        stats = llm.stats()
        assert (stats["pages_shared"] > 0) != off
        assert stats["pages_shared"] < stats["pages_attended"]
    assert found[0] == found[1]
