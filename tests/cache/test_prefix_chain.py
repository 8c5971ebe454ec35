"""Digests of a prefix chain are equal for equal prefixes and for no others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from spectral_paged.cache.prefix import PrefixChain


def digests(ids, *, root="r", prompt=10**9, differ=True):
    chain = PrefixChain(root, prompt, generated_differ=differ)
    chain.extend(ids, len(ids))
    return [chain[i] for i in range(len(chain))]


def test_no_two_of_many_spans_share_a_digest():
    """With two bytes each pair in 65,536 would, with three bytes some of these do."""
    ids = list(range(64)) * 20_000
    assert len(set(digests(ids))) == 20_000


@pytest.mark.parametrize("place", [0, 1, 31, 63, 64, 127])
@pytest.mark.parametrize("step", [1, 1 << 8, 1 << 16, 1 << 31, 1 << 32])
def test_every_bit_of_every_id_counts(place, step):
    """Vocabularies have more than 65,536 tokens."""
    ids = list(range(128))
    other = [*ids[:place], ids[place] + step, *ids[place + 1 :]]
    here, there = digests(ids), digests(other)
    changed = place // 64
    assert here[:changed] == there[:changed]
    assert not set(here[changed:]) & set(there[changed:])


@settings(max_examples=40, deadline=None)
@given(
    first=st.lists(st.integers(0, 1), min_size=3, max_size=3),
    second=st.lists(st.integers(0, 1), min_size=3, max_size=3),
    roots=st.tuples(st.sampled_from("ab"), st.sampled_from("ab")),
    cut=st.integers(0, 192),
)
def test_digests_are_equal_as_far_as_roots_and_tokens_are(first, second, roots, cut):
    """However the tokens came, at once or one after another."""
    spans = [[span for part in parts for span in [part] * 64] for parts in (first, second)]
    chain = PrefixChain(roots[0], 10**9, generated_differ=True)
    for count in (cut, 192):
        chain.extend(spans[0], count)
    assert len(chain) == 3
    there = digests(spans[1], root=roots[1])
    for index in range(3):
        same = roots[0] == roots[1] and first[: index + 1] == second[: index + 1]
        assert (chain[index] == there[index]) == same


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 127, 128])
def test_a_span_with_generated_tokens_is_of_its_prompts_length(prompt):
    ids = list(range(256))
    plain, here = digests(ids), digests(ids, prompt=prompt)
    same = prompt // 64  # spans of prompt tokens alone
    assert here[:same] == plain[:same] and not set(here[same:]) & set(plain[same:])
    longer = digests(ids, prompt=prompt + 1)
    apart = min(same, (prompt + 1) // 64)
    assert here[:apart] == longer[:apart]
    assert not set(here[same:]) & set(longer[same:])
    assert digests(ids, prompt=prompt, differ=False) == plain
