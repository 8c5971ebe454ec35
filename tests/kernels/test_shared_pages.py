"""Pages that sequences begin with together are read by tiles of them, with the same results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.kernels.decode.gpu import decode_attention, spectral_decode
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.decode.reference import (
    decode_attention as attend_twin,
    spectral_decode as twin,
)
from spectral_paged.kernels.decode.shared_pages import SharedPages, seats_per_tile
from spectral_paged.kernels.launch.configs import DecodeConfig
from support.kernel_cases import attend, attend_case, page_error, shared_case

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter; test_gpu runs these on the GPU"
)
# (queries a KV head, groups of `shared_case`, sequences alone)
SHAPES = {
    "two-sequences": (4, [(2, (0, 1))], ()),
    "a-full-tile": (4, [(1, (1, 0, 2, 0))], (1,)),
    "one-more-than-a-tile": (4, [(2, (0, 0, 1, 0, 0, 0))], ()),
    "several-groups": (4, [(3, (1, 0, 0)), (1, (2, 0)), (2, (0, 1))], (0, 3)),
    "one-query-a-head": (1, [(2, (*[0] * 17, 1))], (1,)),
    "eight-queries-a-head": (8, [(1, (0, 1)), (2, (1, 1))], ()),
    "three-queries-a-head": (3, [(2, (0, 1, 0, 0, 0, 0, 2))], (2,)),
    "nobody-shares": (4, [], (1, 0, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
def test_the_twin_reads_shared_pages_as_each_sequence_does(name, shape):
    group, groups, alone = SHAPES[shape]
    args, options, shared = shared_case(name, groups, alone, group=group, heads=2)
    assert page_error(twin, args, options, shared=shared) < 1e-5


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_read_shared_pages_as_the_twin_does(shape):
    group, groups, alone = SHAPES[shape]
    args, options, shared = shared_case("quality-64", groups, alone, group=group)
    assert page_error(spectral_decode, args, options, shared=shared) < 2e-3


@interpreted
@pytest.mark.parametrize("name", ["int8-post-64", "slots-without-gain", "many-bands"])
def test_formats_of_any_kind_are_shared(name):
    """Pages with bases of their own, which are applied to a whole tile, among them."""
    args, options, shared = shared_case(name, [(2, (1, 0, 0))], (1,), group=4, heads=2)
    assert page_error(spectral_decode, args, options, shared=shared) < 2e-3


@interpreted
def test_sixty_four_sequences_share_a_page():
    args, options, shared = shared_case("quality-64", [(1, (*[0] * 63, 1))], group=1)
    assert page_error(spectral_decode, args, options, shared=shared) < 2e-3


@interpreted
@pytest.mark.parametrize("op", [spectral_decode, twin], ids=["kernel", "twin"])
def test_scores_of_shared_pages_are_capped(op):
    args, options, shared = shared_case("quality-64", [(2, (1, 0, 1))], group=4)
    assert page_error(op, args, options, scores={"softcap": 3.0}, shared=shared) < 2e-3


@interpreted
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize("name", ["quality-64", "int8-post-64"])
def test_the_number_of_splits_changes_nothing_that_shows(name, programs):
    args, options, shared = shared_case(name, [(3, (2, 0)), (1, (0, 1))], (2,), group=4)
    config = DecodeConfig(programs=programs)
    assert page_error(spectral_decode, args, options, shared=shared, config=config) < 2e-3


@pytest.mark.parametrize("op", [attend_twin, decode_attention], ids=["twin", "kernel"])
def test_landmarks_shared_pages_own_pages_and_tail_are_one_softmax(op):
    if op is decode_attention and torch.cuda.is_available():
        pytest.skip("the interpreter; test_gpu runs this on the GPU")
    (q, pages, table, counts), given, shared = shared_case(
        "quality-64", [(2, (1, 0, 0))], (1, 0), group=3, heads=2
    )
    tokens = (70, 0, 64, 130, 1)
    (_, plane, exact_table, tokens, _, _), options = attend_case(
        "quality-64", (1, 0, 0, 0, 0), tokens
    )
    before = 4 * options["layout"].page_bytes  # exact pages lie behind those of the other case
    moved = exact_table + (len(pages) - before) // 128
    args = (q, torch.cat((pages, plane[before:])), moved, tokens, table, counts)
    options |= given
    want = attend(attend_twin, args, options)
    got = attend(op, args, options | {"shared": shared})
    assert float((got - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("op", [spectral_decode, twin], ids=["kernel", "twin"])
def test_a_window_over_shared_pages_is_refused(op):
    args, options, shared = shared_case("quality-64", [(1, (0, 0))])
    visible = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="sliding window"):
        op(*args, **options, first_visible=visible, shared=shared)


def test_a_tile_takes_as_many_sequences_as_their_queries_leave_room_for():
    assert [seats_per_tile(group) for group in (1, 2, 3, 4, 5, 8, 9, 16)] == [
        *(16, 8, 5, 4, 3, 2, 1, 1)
    ]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seats=st.integers(2, 16), group=st.integers(1, 4), heads=st.integers(1, 3))
def test_tiles_hold_the_queries_of_their_members_and_hand_results_back(data, seats, group, heads):
    num_seqs = data.draw(st.integers(2, 40))
    num_tiles = num_seqs // 2
    sizes = data.draw(st.lists(st.integers(2, seats), max_size=num_tiles))
    while sum(sizes) > num_seqs:
        sizes.pop()
    order = data.draw(st.permutations(range(num_seqs)))
    column, starts, members, at = [0] * num_seqs, [0] * num_seqs, [], 0
    for tile, size in enumerate(sizes):
        members.append(order[at : at + size])
        for place, sequence in enumerate(members[-1]):
            column[sequence], starts[sequence] = 1 + tile * seats + place, tile + 1
        at += size
    table = torch.arange(num_seqs)[:, None].expand(-1, 3).int()
    shared = SharedPages.of(
        *(torch.tensor(x, dtype=torch.int32) for x in (column, starts)),
        table,
        num_kv_heads=heads,
        seats_per_tile=seats,
    )
    assert shared.counts.tolist() == [*range(1, len(sizes) + 1), *[0] * (num_tiles - len(sizes))]
    q = torch.randn(num_seqs, heads * group, 2)
    of_tiles = shared.queries(q)
    assert of_tiles.shape == (num_tiles, heads * seats * group, 2)
    for tile, held in enumerate(members):
        assert shared.table[tile].tolist() == [held[0]] * 3
        rows = of_tiles[tile].view(heads, seats, group, 2)
        for place, sequence in enumerate(held):
            assert torch.equal(rows[:, place], q[sequence].view(heads, group, 2))
    back = shared.by_sequence(of_tiles, 9.0)
    for sequence, seat in enumerate(column):
        assert torch.equal(back[sequence], q[sequence] if seat else torch.full_like(q[0], 9.0))


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=12),
    target=st.integers(1, 100),
)
def test_items_of_entries_behind_a_start_are_those_entries(counts, target):
    own, starts = (torch.tensor(x) for x in zip(*counts))
    plan = DecodePlan.of(
        own, max_entries=int(own.sum()) + 3, target_items=target, by_entry=True, starts=starts
    )
    seen = {i: [] for i in range(len(counts))}
    for item in range(plan.num_items):
        seq = int(plan.item_seq[item])
        if seq < len(counts):
            seen[seq] += range(int(plan.item_start[item]), int(plan.item_end[item]))
    want = {i: list(range(start, start + n)) for i, (n, start) in enumerate(counts)}
    assert seen == want
    numbers = [int(plan.first_entry[i]) + e for i, entries in want.items() for e in entries]
    assert numbers == list(range(int(own.sum()))) == list(range(int(plan.first_entry[-1])))
    owners = plan.entry_seq[: len(numbers)].tolist()
    assert owners == [i for i, entries in want.items() for _ in entries]
