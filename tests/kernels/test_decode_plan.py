"""The division of a decode step's work into items."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.kernels.decode.plan import DecodePlan


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=12),
    target=st.integers(1, 200),
    slack=st.integers(0, 50),
    grain=st.integers(1, 6),
)
def test_items_cover_every_entry_once_and_are_of_like_size(counts, target, slack, grain):
    plan = DecodePlan.of(
        torch.tensor(counts),
        max_entries=sum(counts) + slack,
        target_items=target,
        grain=grain,
        by_entry=True,
    )
    limit = max(1, -(-sum(counts) // target))
    limit = max(limit, min(grain, -(-sum(counts) // max(1, target // 2))))
    sizes = [set() for _ in counts]
    seen = {i: [] for i in range(len(counts))}
    for item in range(plan.num_items):
        seq, start = int(plan.item_seq[item]), int(plan.item_start[item])
        if seq == len(counts):
            continue  # a slot without work
        assert int(plan.first_item[seq]) <= item < int(plan.first_item[seq + 1])
        end = int(plan.item_end[item])
        assert start < end <= start + limit
        sizes[seq].add(end - start)
        seen[seq] += range(start, end)
    assert seen == {i: list(range(count)) for i, count in enumerate(counts)}
    assert all(max(s) - min(s) <= 1 for s in sizes if s)
    assert plan.first_entry.tolist() == [sum(counts[:i]) for i in range(len(counts) + 1)]
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    past = [len(counts)] * (max(sum(counts) + slack, 1) - len(owners))
    assert plan.entry_seq.tolist() == owners + past


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=3, max_size=3),
    others=st.lists(st.integers(0, 70), min_size=3, max_size=3),
)
def test_the_number_of_items_does_not_depend_on_the_lengths(counts, others):
    """A captured graph has one launch shape."""
    plans = [
        DecodePlan.of(torch.tensor(c), max_entries=210, target_items=16) for c in (counts, others)
    ]
    assert plans[0].num_items == plans[1].num_items == 19


def test_items_have_the_grain_where_enough_of_them_are_left():
    def longest(total, grain):
        plan = DecodePlan.of(torch.tensor([total]), max_entries=total, target_items=16, grain=grain)
        return int((plan.item_end - plan.item_start).max())

    assert [longest(n, 1) for n in (4, 16, 32, 320)] == [1, 1, 2, 20]
    assert [longest(n, 4) for n in (4, 16, 32, 320)] == [1, 2, 4, 20]
